"""PDE-SSM: token mixing by a learnable convection-diffusion-reaction equation, solved in the Fourier domain.

On a grid of h x w tokens, seen as the unit torus, the hidden state follows

    dh/dt = div(K grad h) + b . grad h + r h,     h(0) = (g0 + gx d/dx + gy d/dy) (R u)          (2), (6)

up to time tau. A Fourier mode with wave vector k = 2 pi (m_x, m_y) is multiplied by G(k) B(k), so that

    h = irfft2( G(k) B(k) rfft2(R u) ),     G(k) = exp(tau Lambda(k)),     B(k) = g0 + i (gx kx + gy ky)

costs O(N log N). Equation numbers are those of the PDE-SSM paper. x runs along the width and y along the height:
tensors are (..., h, w), so x is their last axis, while pairs of coefficients are in the order (x, y).
Besides torch, this file needs pde_ssm_kernels/, which computes the same values faster, and pde_ssm_attention.py.
"""

import math

import torch
from torch import nn

import pde_ssm_kernels
from pde_ssm_attention import ARGUMENTS, exchange
from pde_ssm_kernels import BACKENDS, pytorch, set_backend  # noqa: F401  (BACKENDS and set_backend are re-exported)
from pde_ssm_kernels.kept import Keeping, forget, kept
from pde_ssm_kernels.modes import full_precision, widen
from pde_ssm_kernels.products import matmul

TERMS = ("diffusion", "convection", "reaction")
R_MAX = 1.0          # r <= R_MAX and tau r <= R_MAX: no mode grows by more than exp(R_MAX). Also in pairs.py and pairs.cpp
LARGEST_LOG_TAU = 15  # keeps tau times other numbers finite in float32, wherever an optimiser moves log_tau
LEAST_GROWTH = -80   # exp of anything smaller is negligible in float32, and is ten times slower where it underflows


def wave_numbers(n, half=False, dtype=torch.float32, device=None):
    """Returns the wave numbers 2 pi m of n points on the unit circle, in FFT order; with `half`, only those of rfft.

    Returns (k, k_odd). They differ at the Nyquist frequency of an even n: it has no partner of the other sign, so
    a real signal admits no odd power of k there, and k_odd is 0 (the derivative of cos(pi n x) vanishes on the grid).
    """
    m = torch.arange(n // 2 + 1 if half else n, dtype=dtype, device=device)
    if not half:
        m = (m + n // 2) % n - n // 2
    return 2 * math.pi * m, 2 * math.pi * m * (2 * m.abs() != n)


def wave_vectors(h, w, like):
    """Returns kx (w // 2 + 1,) and ky (h, 1) as rfft2 of an h x w grid has them, then both for odd powers."""
    ky, ky_odd = wave_numbers(h, dtype=like.dtype, device=like.device)
    kx, kx_odd = wave_numbers(w, half=True, dtype=like.dtype, device=like.device)
    return kx, ky[:, None], kx_odd, ky_odd[:, None]


def exponent(K, b, r, h, w):
    """Returns Lambda(k) = -(Kxx kx^2 + 2 Kxy kx ky + Kyy ky^2) + r + i (bx kx + by ky), real and imaginary part.      (8)

    K (..., 2, 2), b (..., 2) and r (...) -> (..., h, w // 2 + 1) both, in units of the torus (side 1, whatever h and w).
    """
    kx, ky, kx_odd, ky_odd = wave_vectors(h, w, K)
    r, Kxx, Kxy, Kyy = (x[..., None, None] for x in (r, K[..., 0, 0], K[..., 0, 1], K[..., 1, 1]))
    bx, by = (x[..., None, None] for x in b.unbind(-1))
    return r - (Kxx * kx**2 + 2 * Kxy * kx_odd * ky_odd + Kyy * ky**2), bx * kx_odd + by * ky_odd


def green_symbol(K, b, r, tau, h, w):
    """Returns the Green's function in the Fourier domain, G(k) = exp(tau Lambda(k)).                               (10)

    K (..., 2, 2), b (..., 2), r (...) and tau (...) broadcast over their leading axes; see `exponent`.
    (..., h, w // 2 + 1), complex64, or complex128 for float64 coefficients.
    """
    shift = tau[..., None] * b
    shift = shift - shift.round()  # the same on the torus, and its products with wave numbers are rounded less
    growth, phase = exponent(tau[..., None, None] * K, shift, tau * r, h, w)
    return torch.polar(*torch.broadcast_tensors(growth.clamp_min(LEAST_GROWTH).exp(), phase))


def embedding_symbol(g0, gx, gy, h, w):
    """Returns the embedding of the input in the Fourier domain, B(k) = g0 + i (gx kx + gy ky).                      (6)

    g0, gx, gy (...) -> (..., h, w // 2 + 1), complex.
    """
    _, _, kx, ky = wave_vectors(h, w, g0)
    g0, gx, gy = (g[..., None, None] for g in (g0, gx, gy))
    return torch.complex(*torch.broadcast_tensors(g0, gx * kx + gy * ky))


def rfft2(v):
    """Transforms tokens (B, h, w, C) of any type to (B, C, h, w // 2 + 1), complex, in float32 or wider."""
    # The input is made contiguous here and below because MKL's complex transforms of other layouts may write out of bounds.
    return torch.fft.rfft2(widen(v).movedim(-1, 1).contiguous())


def irfft2(v_hat, like):
    """Returns the inverse of `rfft2`, in the shape and type of the tokens `like`."""
    return torch.fft.irfft2(v_hat.contiguous(), s=like.shape[1:3]).movedim(1, -1).to(like.dtype)


def evolve_plainly(v, rows):
    """Returns irfft2(G B rfft2(v)) for v (B, h, w, C), the sum of n PDEs per channel: the reference of every kernel's tests.

    rows ([B], n, 9, C): tau times r, Kxx, Kxy, Kyy, bx and by, then gx, gy and g0.
    """
    h, w = v.shape[1:3]
    r, Kxx, Kxy, Kyy, bx, by, gx, gy, g0 = rows.unbind(-2)
    G = green_symbol(matrix(Kxx, Kxy, Kyy), torch.stack([bx, by], dim=-1), r, torch.ones_like(r), h, w)
    return irfft2((G * embedding_symbol(g0, gx, gy, h, w)).sum(-4) * rfft2(v), v)


def matrix(xx, xy, yy):
    """Builds symmetric matrices (..., 2, 2) from their entries (...)."""
    return torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2))


def initial_widths(token, n):
    """Returns n diffusion lengths l, where K = l^2, so that the Gaussian at tau = 1 has the standard deviation sqrt(2) l."""
    return torch.logspace(math.log(token / 2), math.log(max(1 / 4, token / 2)), n, base=math.e) / math.sqrt(2)


def initial_shifts(token, shape):
    """Returns random vectors (*shape, 2) of up to two tokens, in all directions."""
    angle, length = 2 * math.pi * torch.rand(shape), 2 * token * torch.rand(shape)
    return torch.stack([length * angle.cos(), length * angle.sin()], dim=-1)


class PDE(Keeping):
    """Holds what the couplings share: g0, gx, gy and log_tau, and the scalar coefficients of each PDE (matrices in `Coupled`).

    All are plain parameters, not layers, so initialisers that walk over a model's layers leave them alone. An absent
    term has no parameters, and its coefficients are zero.
    """

    groups = components = 1

    def __init__(self, dim, grid_size, terms):
        super().__init__()
        self.dim, self.terms, self.token = dim, terms, 1 / max(grid_size)

    def forward(self, *arguments):
        return self.evolve(*arguments)  # only calls of a module run hooks: users' own, and those that prune parameters

    def create_scalars(self, log_l, r):
        """Adds parameters in the shape of log_l: isotropic diffusion with widths exp(log_l), shifts, and the rates r."""
        self.gx, self.gy = (nn.Parameter(torch.zeros_like(log_l)) for _ in range(2))
        if "diffusion" in self.terms:
            self.log_lx = nn.Parameter(log_l)
            self.log_ly = nn.Parameter(log_l.clone())
            self.shear = nn.Parameter(torch.zeros_like(log_l))
        if "convection" in self.terms:
            self.b = nn.Parameter(initial_shifts(self.token, log_l.shape))
        if "reaction" in self.terms:
            self.r_slack = nn.Parameter((R_MAX - r).expm1().log())

    def entries(self):
        """Returns r (before `bound`, which lowers it where tau is large), Kxx, Kxy, Kyy, bx and by."""
        r = Kxx = Kxy = Kyy = bx = by = self.absent()
        if "diffusion" in self.terms:
            lx, ly, shear = widen(self.log_lx).exp(), widen(self.log_ly).exp(), widen(self.shear)
            lyx = shear * ly
            Kxx, Kxy, Kyy = lx.square(), lx * lyx, torch.addcmul(ly.square(), lyx, lyx)
        if "convection" in self.terms:
            bx, by = widen(self.b).unbind(-1)
        if "reaction" in self.terms:
            r = R_MAX - nn.functional.softplus(widen(self.r_slack))
        return r, Kxx, Kxy, Kyy, bx, by

    def bound(self, r, tau):
        """Returns r, lowered where needed so that tau r <= R_MAX."""
        return torch.minimum(r, R_MAX / (tau if r.ndim < 3 else tau[:, None, None]))

    def embedding(self):
        return widen(self.g0), widen(self.gx), widen(self.gy)

    def tau(self):
        return widen(self.log_tau).clamp_max(LARGEST_LOG_TAU).exp()

    def coefficients(self):
        """Returns K (..., 2, 2), b (..., 2), r (...) and tau, in float32 or wider; zero for absent terms.

        Their leading axes are (dim,) or (components, dim); where channels are coupled, (groups, c, c) with tau (groups,).
        """
        tau = self.tau()
        r, Kxx, Kxy, Kyy, bx, by = self.entries()
        return matrix(Kxx, Kxy, Kyy), torch.stack([bx, by], dim=-1), self.bound(r, tau), tau

    def absent(self):
        """Returns the coefficients of a term that the PDE lacks: zeros like g0, or None where it lacks no term."""
        return None if len(self.terms) == len(TERMS) else widen(self.g0).new_zeros(()).expand(self.g0.shape)


class Diagonal(PDE):
    """A PDE for each of `dim` channels, or, with `components`, the sum of that many.

    Parameters, (dim,) unless said otherwise: g0, gx, gy; log_tau; log_lx, log_ly and shear, which give K = L L^T with
    L = [[lx, 0], [shear ly, ly]]; b (dim, 2); r_slack, which gives r = min(R_MAX - softplus(r_slack), R_MAX / tau). So K is
    positive definite and tau r <= R_MAX whatever an optimiser does: |G(k)| <= exp(R_MAX), or exp(e^2 R_MAX) in a conditioned
    layer, whose time goes up to e^2 tau. The bound is a minimum, which leaves every r below it as it is; where it acts, which
    takes tau > 1, r_slack has no gradient. tau itself ends at e^LARGEST_LOG_TAU.
    With one token's width 1 / max(h, w), they start at
    - tau = 1, r = 0, g0 = 1, gx = gy = 0: a contraction that keeps the mean;
    - K isotropic, its Gaussian (variance 2 tau K) with a standard deviation that runs log-uniformly over the channels
      from half a token, the finest that the grid resolves, to 1/4, beyond which the torus looks flat;
    - b tau: shifts of up to two tokens in all directions, so that first neighbours are told apart.

    With components, which together make band-pass filters, all of these are (components, dim, ...), the widths are shuffled
    within a component, and all but the first, whose g0 is 1, have a random g0 of standard deviation 1/2.
    """

    evolve_plainly = staticmethod(evolve_plainly)  # where kernels, which never import this file, find it

    def __init__(self, dim, grid_size, terms, components):
        super().__init__(dim, grid_size, terms)
        log_l = initial_widths(self.token, dim).log()
        self.components, self.g0 = components, nn.Parameter(torch.ones(dim))
        if components > 1:
            log_l = torch.stack([log_l[torch.randperm(dim)] for _ in range(components)])
            self.g0 = nn.Parameter(torch.cat([torch.ones(1, dim), torch.randn(components - 1, dim) / 2]))
        self.log_tau = nn.Parameter(torch.zeros_like(log_l))
        self.create_scalars(log_l, torch.zeros_like(log_l))

    def evolve(self, v, time_scale=None):                                  # (B, h, w, dim), (B, dim) or None
        """Evolves v = R u to the state at time tau, (B, h, w, dim); time_scale multiplies tau."""
        if fast := pde_ssm_kernels.choose(v, self, time_scale):
            return fast(v, self, time_scale)
        return irfft2(self.symbol(*v.shape[1:3], time_scale) * rfft2(v), v)

    @kept
    def symbol(self, h, w, time_scale=None):
        """Returns G(k) B(k), (dim, h, w // 2 + 1), or, with time_scale, one per image, (B, dim, h, w // 2 + 1)."""
        K, b, r, tau = self.coefficients()
        if time_scale is not None:
            tau = tau * (time_scale if self.components == 1 else time_scale[:, None])
        symbol = green_symbol(K, b, r, tau, h, w) * embedding_symbol(*self.embedding(), h, w)
        return symbol if self.components == 1 else symbol.sum(-4)

    @kept
    def rows(self, time_scale=None):
        """Returns the coefficients from which kernels compute symbols, ([B], components, 9, dim): see `evolve_plainly`."""
        (g0, gx, gy), tau, (r, *others) = self.embedding(), self.tau(), self.entries()
        growth = (tau * r).clamp_max(R_MAX)[..., None, :]                  # = tau * bound(r, tau), with a cheaper backward
        exponents = tau[..., None, :] * torch.stack(others, dim=-2)
        rows = torch.cat([growth, exponents, torch.stack([gx, gy, g0], dim=-2)], dim=-2).view(-1, 9, self.dim)
        if time_scale is not None:
            rows = torch.cat([time_scale[:, None, None] * rows[:, :6], rows[:, 6:].expand(len(time_scale), -1, -1, -1)], dim=-2)
        return rows

    def kernel(self, h, w):
        return torch.fft.irfft2(green_symbol(*self.coefficients(), h, w), s=(h, w))


class Pairwise(PDE):
    """Every pair of channels in a group has a PDE, whose Green's function maps one channel to the other: Algorithm 1.

    With c = dim / groups channels in a group, g0, gx, gy and the parameters of K, b and r are those of `Diagonal` with
    the shape (groups, c, c), output channels before input channels; log_tau is (groups,). The exponential is taken
    entry by entry: h_i = sum_j G_ij * (B R u)_j, like a convolution with as many channels, in O(N c dim).

    A channel's PDE with itself starts as in `Diagonal`. Between two channels r starts at -log c, so that all other channels
    together contribute about as much as the channel itself; without the reaction term, g0 starts at 1 / c instead of 1.
    """

    is_system, wave_vectors = False, staticmethod(wave_vectors)            # for kernels, which never import this file

    def __init__(self, dim, grid_size, terms, groups):
        super().__init__(dim, grid_size, terms)
        self.groups, c = groups, dim // groups
        shape, own = (groups, c, c), torch.eye(c).expand(groups, c, c)
        self.g0 = nn.Parameter(own / (1 if "reaction" in terms else c))
        self.log_tau = nn.Parameter(torch.zeros(groups))
        log_l = initial_widths(self.token, math.prod(shape)).log().view(shape)
        self.create_scalars(log_l, math.log(c) * (own - 1))

    def evolve(self, v):                                                   # (B, h, w, dim)
        """Evolves v = R u to the state at time tau, (B, h, w, dim)."""
        if fast := pde_ssm_kernels.choose(v, self):
            return fast(v, self)
        G, B = self.green(*v.shape[1:3]), embedding_symbol(*self.embedding(), *v.shape[1:3])
        v_hat = rfft2(v).unflatten(1, (self.groups, -1))                   # (B, groups, c, h, w // 2 + 1)
        return irfft2(torch.einsum("gijhw,gjkhw,bgkhw->bgihw", G, B, v_hat).flatten(1, 2), v)

    def green(self, h, w):
        """Returns G(k), (groups, c, c, h, w // 2 + 1)."""
        K, b, r, tau = self.coefficients()
        return green_symbol(K, b, r, tau[:, None, None], h, w)

    @kept
    def symbol(self, h, w):
        """Returns G(k) at all wave vectors, in the layout of `pytorch.symbol`."""
        return pytorch.symbol(self, h, w)

    def kernel(self, h, w):
        return torch.fft.irfft2(self.green(h, w), s=(h, w)).flatten(0, 1)


class Coupled(PDE):
    """The channels of a group follow one system of PDEs: G(k) is the matrix exponential of tau Lambda(k).

    With c = dim / groups, matrices (groups, c, c) unless said otherwise: g0, gx, gy; log_tau (groups,); lx, ly and
    shear, which give K(k) = P P^T with P = [kx lx + ky shear, ky ly], the matrix form of the Cholesky factor of
    `Diagonal`; bx and by, whose symmetric parts count; r_root, which gives r = R_MAX - r_root r_root^T, minus the multiple
    of the identity that lowers its largest eigenvalue, by Gershgorin's bound, to R_MAX / tau. K(k) is positive semi-definite,
    i k . b is anti-Hermitian and tau r <= R_MAX, so the 2-norm of G(k) is at most exp(R_MAX), but for rounding, which grows
    with the size of tau k . b. Starts as `Diagonal` does, without coupling.
    """

    is_system, wave_vectors = True, staticmethod(wave_vectors)             # for kernels, likewise
    evolve, symbol, kernel = Pairwise.evolve, Pairwise.symbol, Pairwise.kernel

    def __init__(self, dim, grid_size, terms, groups):
        super().__init__(dim, grid_size, terms)
        self.groups, c, token = groups, dim // groups, self.token
        own = torch.eye(c).expand(groups, c, c)
        self.g0 = nn.Parameter(own.clone())
        self.gx, self.gy = (nn.Parameter(torch.zeros_like(own)) for _ in range(2))
        self.log_tau = nn.Parameter(torch.zeros(groups))
        if "diffusion" in self.terms:
            l = torch.diag_embed(initial_widths(token, self.dim).view(self.groups, c))
            self.lx, self.ly, self.shear = (nn.Parameter(x) for x in (l, l.clone(), torch.zeros_like(l)))
        if "convection" in self.terms:
            shifts = initial_shifts(token, (self.groups, c)).unbind(-1)
            self.bx, self.by = (nn.Parameter(torch.diag_embed(b)) for b in shifts)
        if "reaction" in self.terms:
            self.r_root = nn.Parameter(math.sqrt(R_MAX) * own)

    def green(self, h, w):
        """Returns G(k) = exp(tau Lambda(k)), (groups, c, c, h, w // 2 + 1)."""
        K, b, r, tau = self.coefficients()
        exponents = tau.view(-1, 1, 1, 1, 1) * torch.complex(*torch.broadcast_tensors(*exponent(K, b, r, h, w)))
        return torch.linalg.matrix_exp(exponents.movedim((1, 2), (3, 4)).contiguous()).movedim((3, 4), (1, 2))

    def entries(self):
        r = Kxx = Kxy = Kyy = bx = by = self.absent()
        if "diffusion" in self.terms:
            lx, ly, shear = widen(self.lx), widen(self.ly), widen(self.shear)
            Kxx, Kyy = matmul(lx, lx.mT), matmul(shear, shear.mT) + matmul(ly, ly.mT)
            Kxy = (matmul(lx, shear.mT) + matmul(shear, lx.mT)) / 2
        if "convection" in self.terms:
            bx, by = ((b + b.mT) / 2 for b in (widen(self.bx), widen(self.by)))
        if "reaction" in self.terms:
            root = widen(self.r_root)
            r = R_MAX * torch.eye(root.shape[-1], dtype=root.dtype, device=root.device) - matmul(root, root.mT)
        return r, Kxx, Kxy, Kyy, bx, by

    def bound(self, r, tau):
        own = r.diagonal(dim1=-2, dim2=-1)
        largest = (own + r.abs().sum(-1) - own.abs()).amax(-1)             # Gershgorin: no eigenvalue is larger
        excess = (largest.clamp_max(R_MAX) - R_MAX / tau).clamp_min(0)
        return r - excess[:, None, None] * torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)


EQUATIONS = {"diagonal": Diagonal, "pairwise": Pairwise, "coupled": Coupled}
COUPLINGS = tuple(EQUATIONS)


class PDESSM(Keeping):
    """The PDE-SSM operator: (B, dim, h, w) -> (B, dim, h, w), for any h and w.

    grid_size:   (h, w) of the tokens it will see; only the initial values depend on it.
    coupling:    "diagonal", "pairwise" or "coupled": which channels share a PDE; see `Diagonal`, `Pairwise`, `Coupled`.
    groups:      number of groups into which pairwise and coupled divide the channels, as attention does into heads. Default: 1
                 for pairwise, as in the paper; for coupled, groups of 8, 4 or 2 channels, since its exponential costs O(c^3).
    state_dim:   channels of the PDE, if not `dim`; a linear layer then maps them back to dim. expand: the same as a multiple
                 of dim, used if state_dim is not given.
    terms:       which of "diffusion", "convection", "reaction" the PDE has; an absent term has no parameters.
    components:  not the paper's: number of PDEs per channel, whose states are summed. Only for the diagonal coupling.
    activation:  not the paper's: silu(R u + bias) in place of R u.
    gate:        not the paper's: the state times silu of a second projection of u, then a linear layer.
    local:       not the paper's: a learnt 3 x 3 stencil of R u (a depthwise convolution, zero outside) is added to the state.
    conditioned: not the paper's: forward also takes a vector c (B, dim), and each channel's tau is multiplied by the
                 exponential of a linear map of c, which starts at zero and is bounded to +-2. Only for the diagonal coupling.

    R is a linear layer (a 1 x 1 convolution). Transform and symbol are computed in float32 (float64 for
    float64 inputs) under any autocast; the result has the type of R u. ValueError for options that do not fit together.
    """

    def __init__(
        self, dim, *, grid_size=(16, 16), coupling="diagonal", groups=None, state_dim=None, expand=1.0, terms=TERMS,
        components=1, activation=False, gate=False, local=False, conditioned=False,
    ):  # fmt: skip
        super().__init__()
        if coupling not in COUPLINGS:
            raise ValueError(f"unknown coupling {coupling!r}; known: {', '.join(COUPLINGS)}")
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, not {terms!r}")
        if not (isinstance(grid_size, tuple | list) and len(grid_size) == 2 and all(n >= 1 and n == int(n) for n in grid_size)):
            raise ValueError(f"grid_size is {grid_size!r}, and not (h, w), two whole numbers from 1")
        if conditioned and coupling != "diagonal":
            raise ValueError(f"conditioned needs coupling='diagonal'; {coupling!r} has too large a symbol for one per image")
        if components < 1 or (components > 1 and coupling != "diagonal"):
            raise ValueError(f"components is {components}, with coupling {coupling!r}; it must be 1, or more if 'diagonal'")
        if coupling == "diagonal" and groups not in (None, 1):
            raise ValueError(f"groups is {groups}, with coupling 'diagonal', which has a PDE for each channel and no groups")
        C = round(expand * dim) if state_dim is None else state_dim
        if groups is None:
            groups = C // math.gcd(C, 8) if coupling == "coupled" else 1
            if 1 < groups == C:
                raise ValueError(f"coupled channels fall into groups of 8, 4 or 2, and {C} do not; give groups")
        if groups < 1 or C < 1 or C % groups:
            raise ValueError(f"{C} channels cannot be split into {groups} equal groups")
        self.dim, self.coupling, self.conditioned, self.activation = dim, coupling, conditioned, activation
        self.R = nn.Linear(dim, C, bias=activation)
        terms = tuple(term for term in TERMS if term in terms)
        self.equation = EQUATIONS[coupling](C, grid_size, terms, components if coupling == "diagonal" else groups)
        self.gate = nn.Linear(dim, C, bias=False) if gate else None
        self.local = nn.Conv2d(C, C, 3, padding=1, groups=C) if local else None
        self.out = nn.Linear(C, dim, bias=False) if gate or dim != C else None
        for layer in filter(None, (self.R, self.gate, self.out)):
            nn.init.xavier_uniform_(layer.weight)
        if activation:
            nn.init.zeros_(self.R.bias)
        self.log_time_scale = nn.Parameter(torch.zeros(C, dim)) if conditioned else None

    def forward(self, u, c=None):                                          # (B, D, h, w), (B, D) or None
        if u.ndim != 4 or u.shape[1] != self.dim or 0 in u.shape[1:] or not u.is_floating_point():
            raise ValueError(f"PDESSM needs a real (B, {self.dim}, h, w); it got {u.dtype} of shape {tuple(u.shape)}")
        if (c is not None) != self.conditioned:
            raise ValueError(f"PDESSM has conditioned={self.conditioned} and got {'no vector' if c is None else 'a vector'} c")
        if c is not None and (c.ndim != 2 or c.shape[0] != u.shape[0] or c.shape[1] != self.dim):
            raise ValueError(f"c is {tuple(c.shape)}, not one vector per image, {(len(u), self.dim)}")
        if torch.is_grad_enabled():
            forget()
        u = u.movedim(1, -1)                                               # (B, h, w, D)
        if (state := pde_ssm_kernels.fold(u, self)) is None:
            v = nn.functional.silu(self.R(u)) if self.activation else self.R(u)    # (B, h, w, C)
            with full_precision(u):
                state = self.equation(v, *([self.time_scale(c)] if self.conditioned else []))          # (B, h, w, C)
            if self.local is not None:
                state = state + self.local(v.movedim(-1, 1)).movedim(1, -1)
        if self.gate is not None:
            state = state * nn.functional.silu(self.gate(u))               # (B, h, w, C)
        return (state if self.out is None else self.out(state)).movedim(-1, 1)     # (B, D, h, w)

    def time_scale(self, c):                                               # (B, D)
        return (2 * torch.tanh(matmul(widen(c), widen(self.log_time_scale).T) / 2)).exp()   # (B, C), from e^-2 to e^2

    def coefficients(self):
        """Returns K, b, r and tau of the PDE; see `PDE.coefficients`."""
        with full_precision(self.equation.g0):
            return self.equation.coefficients()

    def kernel(self, h, w):
        """Returns the real Green's function in space: what a unit impulse at token (0, 0) becomes by time tau, without R and B.

        (C, h, w) for the diagonal coupling, (components, C, h, w) with several components. For the other couplings
        (C, C / groups, h, w), output channels before input channels, as in the weight of a grouped, circular convolution.
        """
        with full_precision(self.equation.g0):
            return self.equation.kernel(h, w)

    def extra_repr(self):
        e = self.equation
        return f"{self.dim}, coupling={self.coupling!r}, groups={e.groups}, components={e.components}, terms={e.terms}"


def receptive_field(kernel):
    """Returns how far a token sees, in tokens: the root mean square of the distance on the torus, weighted by |kernel|.

    kernel (..., h, w), as from `PDESSM.kernel` -> (...). For pure convection by an even number of tokens it is the length of
    the shift; for isotropic diffusion of standard deviation s it is sqrt(2) s, if s is from 1.5 to a sixth of the side. Sharper
    kernels ring.
    """
    h, w = kernel.shape[-2:]
    y, x = (n * torch.fft.fftfreq(n, dtype=kernel.dtype, device=kernel.device) for n in (h, w))
    weight = kernel.abs()
    return ((weight * (x**2 + y[:, None] ** 2)).sum((-2, -1)) / weight.sum((-2, -1))).sqrt()


class PDESSMBlock(nn.Module):
    """Applies PDE-SSM to tokens, (B, N, D) -> (B, N, D): a drop-in replacement for timm's Attention, with its arguments.

    num_heads, qkv_bias and most other arguments of attention have no meaning for a PDE and are ignored; device and dtype are
    those of the parameters, and dim_out, if given, must be dim. The other options are those of `PDESSM`.
    grid_size is the (h, w) of the grid, whose h w tokens come row by row; without it, their number must be a square.

    prefix_tokens is the number of leading tokens that have no place on the grid, such as a class token. Their mean, after a
    linear layer, is added to every token of the grid, and the mean of the grid's result is added to each of them: a uniform
    field, which diffusion and convection leave unchanged.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, *, grid_size=None, prefix_tokens=0, dim_out=None,
                 device=None, dtype=None, **options):  # fmt: skip
        super().__init__()
        if prefix_tokens < 0 or dim_out not in (None, dim):
            raise ValueError(f"{prefix_tokens} prefix_tokens and dim_out={dim_out}: they must be at least 0, and None or {dim}")
        options = {name: value for name, value in options.items() if name not in ARGUMENTS}
        self.pde = PDESSM(dim, grid_size=grid_size or (16, 16), **options)
        self.grid_size, self.prefix_tokens = tuple(grid_size) if grid_size else None, prefix_tokens
        self.conditioned = self.pde.conditioned
        self.prefix = nn.Linear(dim, dim, bias=False) if prefix_tokens else None
        self.to(device=device, dtype=dtype)

    def forward(self, tokens, c=None, **call):                             # (B, P + N, D), (B, D) or None
        """Mixes tokens (B, P + N, D). `call` holds further arguments that callers pass to attention: rope is ignored, since a
        PDE knows where tokens are; a mask, a context or any other value except None and False raises a ValueError."""
        if given := [name for name, value in call.items() if value is not None and value is not False and name != "rope"]:
            raise ValueError(f"PDESSMBlock mixes a grid of tokens and cannot follow {', '.join(given)}")
        if tokens.ndim != 3:
            raise ValueError(f"PDESSMBlock needs tokens (B, N, {self.pde.dim}); it got the shape {tuple(tokens.shape)}")
        prefix, tokens = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        N = tokens.shape[1]
        h, w = self.grid_size or (math.isqrt(N), math.isqrt(N))
        if N == 0 or h * w != N:
            grid = f"{h} x {w} = {h * w} tokens" if self.grid_size else "a square number of tokens"
            after = f" after {self.prefix_tokens} prefix_tokens" if self.prefix_tokens else ""
            raise ValueError(f"PDESSMBlock got {N} tokens on the grid{after}; it needs {grid}: set grid_size or prefix_tokens")
        u = tokens.transpose(1, 2).unflatten(2, (h, w))                    # (B, D, h, w)
        mixed = self.pde(u, c).flatten(2).transpose(1, 2)                  # (B, N, D)
        if self.prefix is None:
            return mixed
        uniform = self.prefix(prefix)                                      # (B, P, D)
        return torch.cat([uniform + mixed.mean(1, keepdim=True), mixed + uniform.mean(1, keepdim=True)], dim=1)


# Named presets: options of PDESSMBlock. The first has the paper's PDE, one per channel. The others are ours, with at most
# as many parameters as attention's 4 D^2 + 4 D: 3.5 D^2 + 48 D from 89 channels on, and 3.5 D^2 + 36 D from 66 on.
PRESETS = {
    "pdessm": {},
    "pdessm-g": {"gate": True, "activation": True, "components": 4, "expand": 7 / 6},
    "pdessm-gl": {"gate": True, "activation": True, "components": 2, "expand": 7 / 6, "local": True},
}


def options_from_weights(weights):
    """Returns the options with which to build the PDESSMBlock that has these weights, a state dict without prefix tokens.
    KeyError if the weights are not those of a PDESSMBlock."""
    g0 = weights["pde.equation.g0"]
    names = {name.removeprefix("pde.equation.") for name in weights}
    signs = {"diffusion": {"log_lx", "lx"}, "convection": {"b", "bx"}, "reaction": {"r_slack", "r_root"}}
    state_dim, dim = weights["pde.R.weight"].shape
    return {
        "coupling": "diagonal" if g0.ndim < 3 else "coupled" if names & {"lx", "bx", "r_root"} else "pairwise",
        "groups": len(g0) if g0.ndim == 3 else 1,
        "state_dim": state_dim if state_dim != dim else None,
        "terms": tuple(term for term in TERMS if names & signs[term]),
        "components": len(g0) if g0.ndim == 2 else 1,
        "activation": "pde.R.bias" in weights,
        "gate": "pde.gate.weight" in weights,
        "local": "pde.local.weight" in weights,
        "conditioned": "pde.log_time_scale" in weights,
    }


def replace_attention(model, mixer="pdessm", grid_size=None, **options):
    """Replaces every self-attention layer of `model` by a PDESSMBlock, in place, prints how many, and returns the model.

    mixer:     a name in PRESETS, or a class that takes dim, grid_size and, if there are prefix tokens, prefix_tokens.
    grid_size: (h, w) of the tokens; by default the model's, if it has a `grid_size` or its `patch_embed` has one. For
               other inputs later, set `grid_size` of the blocks.
    options:   of PDESSMBlock; prefix_tokens is by default the model's `num_prefix_tokens`.
    For what is replaced, and for errors: `exchange` of pde_ssm_attention.py.
    """
    if isinstance(mixer, str):
        if mixer not in PRESETS:
            raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(PRESETS)}")
        mixer, options = PDESSMBlock, PRESETS[mixer] | options
    if options.get("conditioned"):
        raise ValueError("conditioned needs blocks that pass a conditioning vector to their mixer, as DiT of this project does")
    return exchange(model, mixer, dict(grid_size=grid_size) | options)
