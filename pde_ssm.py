"""PDE-SSM: token mixing by a learnable convection-diffusion-reaction equation, solved in the Fourier domain.

On a grid of h x w tokens, seen as the unit torus, the hidden state follows

    dh/dt = div(K grad h) + b . grad h + r h,     h(0) = (g0 + gx d/dx + gy d/dy) (R u)          (2), (6)

up to time tau. A Fourier mode with wave vector k = 2 pi (m_x, m_y) is multiplied by G(k) B(k), so that

    h = irfft2( G(k) B(k) rfft2(R u) ),     G(k) = exp(tau Lambda(k)),     B(k) = g0 + i (gx kx + gy ky)

costs O(N log N). Equation numbers are those of the PDE-SSM paper. x runs along the width and y along the height:
tensors are (..., h, w), so x is their last axis, while pairs of coefficients are in the order (x, y).
This file needs nothing but torch.
"""

import math
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

TERMS = ("diffusion", "convection", "reaction")
R_MAX = 1.0          # r <= R_MAX, so that no mode grows by more than exp(tau R_MAX)
CHUNK = 2**20        # entries of a matrix symbol that exist at once in training
KEPT = 2**25         # entries of the largest matrix symbol that evaluation keeps between calls
GRIDS_KEPT = 2       # grid sizes whose symbols evaluation keeps
LONGEST_MATRIX = 32  # sides up to which a product with the Fourier matrix beats an FFT on CPU

# timm's Attention takes these too; none of them has a meaning for a PDE.
_ATTENTION_ARGUMENTS = {
    "attn_head_dim", "qk_norm", "scale_norm", "proj_bias", "attn_drop", "proj_drop", "norm_layer", "gated",
}  # fmt: skip


def wave_numbers(n, half=False, dtype=torch.float32, device=None):
    """Wave numbers 2 pi m of n points on the unit circle, in FFT order; with `half`, those of rfft alone.

    Returns (k, k_odd). They differ at the Nyquist frequency of an even n: it has no partner of the other sign, so
    a real signal admits no odd power of k there, and k_odd is 0 (the derivative of cos(pi n x) vanishes on the grid).
    """
    m = torch.arange(n // 2 + 1, dtype=dtype, device=device)
    if not half:
        m = torch.cat([m[: (n + 1) // 2], torch.arange(-(n // 2), 0, dtype=dtype, device=device)])
    return 2 * math.pi * m, 2 * math.pi * m * (2 * m.abs() != n)


def wave_vectors(h, w, dtype=torch.float32, device=None):
    """kx, ky, kx_odd, ky_odd of an h x w grid as rfft2 orders them; kx* are (w // 2 + 1,) and ky* (h, 1)."""
    ky, ky_odd = wave_numbers(h, dtype=dtype, device=device)
    kx, kx_odd = wave_numbers(w, half=True, dtype=dtype, device=device)
    return kx, ky[:, None], kx_odd, ky_odd[:, None]


def growth_and_phase(K, b, r, kx, ky, kx_odd, ky_odd):
    """Real and imaginary part of Lambda(k) = -(Kxx kx^2 + 2 Kxy kx ky + Kyy ky^2) + r + i (bx kx + by ky)      (8)

    K (..., 2, 2), b (..., 2), r (...): their leading axes broadcast against those of the wave vectors.
    """
    growth = r - K[..., 0, 0] * kx**2 - 2 * K[..., 0, 1] * kx_odd * ky_odd - K[..., 1, 1] * ky**2
    return growth, b[..., 0] * kx_odd + b[..., 1] * ky_odd


def green_symbol(K, b, r, tau, h, w):
    """The Green's function in the Fourier domain: G(k) = exp(tau Lambda(k))                                    (10)

    K (..., 2, 2), b (..., 2), r (...) and tau (...) broadcast over their leading axes and are in units of the torus
    (side 1, whatever h and w). Returns (..., h, w // 2 + 1), complex64, or complex128 for float64 coefficients.
    """
    k = wave_vectors(h, w, K.dtype, K.device)
    growth, phase = growth_and_phase(K[..., None, None, :, :], b[..., None, None, :], r[..., None, None], *k)
    tau = tau[..., None, None]
    return torch.polar(*torch.broadcast_tensors(torch.exp(tau * growth), tau * phase))


def embedding_symbol(g0, gx, gy, h, w):
    """The embedding of the input in the Fourier domain, Eq. (6): B(k) = g0 + i (gx kx + gy ky).

    g0, gx, gy (...) -> (..., h, w // 2 + 1), complex.
    """
    _, _, kx, ky = wave_vectors(h, w, g0.dtype, g0.device)
    g0, gx, gy = (g[..., None, None] for g in (g0, gx, gy))
    return torch.complex(*torch.broadcast_tensors(g0, gx * kx + gy * ky))


def initial_widths(token, n):
    """n diffusion lengths l with K = l^2, so that the Gaussian's standard deviation at tau = 1 is sqrt(2) l."""
    return torch.logspace(math.log(token / 2), math.log(max(1 / 4, token / 2)), n, base=math.e) / math.sqrt(2)


def initial_shifts(token, shape):
    """Random vectors (*shape, 2) of up to two tokens, in all directions."""
    angle, length = 2 * math.pi * torch.rand(shape), 2 * token * torch.rand(shape)
    return torch.stack([length * angle.cos(), length * angle.sin()], dim=-1)


def convolve(v, symbol):
    """irfft2(symbol * rfft2(v)) along h and w, computed in float32 or wider, in the type of v.

    v (B, h, w, C), real; symbol (2, h, w // 2 + 1, C), its real and imaginary part, or (B, 2, ...) for one per image.
    On CPU the transforms of short sides are matrix products and the gradient is written by hand: see `Convolution`.
    """
    if symbol.ndim == 4 and (kernels := _kernels(v)):
        return kernels.evolve(v, symbol)
    if v.device.type == "cpu" and not _traced(v, symbol):
        return Convolution.apply(_widen(v), symbol)[0].to(v.dtype)
    v_hat = torch.fft.rfft2(_widen(v).movedim(-1, 1))                      # (B, C, h, w // 2 + 1)
    return torch.fft.irfft2(_as_complex(symbol) * v_hat, s=v.shape[1:3]).movedim(1, -1).to(v.dtype)


def _traced(*tensors):
    """Whether somebody looks at each operator: torch.compile, vmap and its like, forward-mode differentiation, or tensors of
    another class (fake, distributed)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if any(type(x) is not torch.Tensor for x in tensors):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _as_complex(symbol):
    """(..., 2, h, w // 2 + 1, C) -> complex (..., C, h, w // 2 + 1)"""
    return torch.complex(*symbol.movedim(-1, -3).contiguous().unbind(-4))


class Convolution(torch.autograd.Function):
    """v, symbol -> irfft2(symbol * v_hat) and v_hat, with the gradient by hand: autograd's own pads the spectrum with zeros.

    With the columns weighted by d (1 where kx has no partner of the other sign, 2 elsewhere, divided by h w), irfft2 is
    the transpose of rfft2 d. So the gradient with respect to v is the same convolution with the conjugate symbol, and
    that with respect to the symbol is d conj(v_hat) g_hat summed over the images. v_hat is an output, so that the
    gradient has a gradient.
    """

    @staticmethod
    def forward(ctx, v, symbol):
        ctx.set_materialize_grads(False)
        v_hat = spectrum(v).data  # views that leave a function with two outputs could not be changed in place; this is none
        ctx.save_for_backward(v_hat, symbol)
        ctx.grid = v.shape[1:3]
        return field(multiply(symbol, v_hat), *ctx.grid).data, v_hat

    @staticmethod
    def backward(ctx, g, v_hat_grad):
        v_hat, symbol = ctx.saved_tensors
        v_grad = symbol_grad = None
        with _full_precision(symbol):                                      # backward() may be called under autocast
            if g is not None:
                v_grad, g_hat = Convolution.apply(g, symbol * symbol.new_tensor([1, -1]).view(2, 1, 1, 1))
                if ctx.needs_input_grad[1]:
                    symbol_grad = correlate(v_hat, g_hat, column_weights(*ctx.grid, g), per_image=symbol.ndim > 4)
            if v_hat_grad is not None:                                     # only under create_graph
                d = column_weights(*ctx.grid, v_hat_grad)
                transposed = field(v_hat_grad / (d if v_hat_grad.is_complex() else d[:, None]), *ctx.grid)
                v_grad = transposed if v_grad is None else v_grad + transposed
        return v_grad, symbol_grad


# The four steps of a convolution. Spectra of grids with sides up to LONGEST_MATRIX are real (B, 2, h, w // 2 + 1, C), as
# tokens are, and come from two products with small matrices; those of larger ones are complex (B, C, h, w // 2 + 1).


def spectrum(v):                                                           # (B, h, w, C)
    B, h, w, C = v.shape
    if max(h, w) > LONGEST_MATRIX:
        return torch.fft.rfft2(v.movedim(-1, 1).contiguous())
    f = w // 2 + 1
    along_w, along_h = fourier_matrices(h, w, v.dtype)
    v_hat = torch.bmm(along_w.expand(B * h, -1, -1), v.reshape(B * h, w, C))         # (B h, 2 f, C)
    return torch.bmm(along_h.expand(B, -1, -1), v_hat.view(B, 2 * h, f * C)).view(B, 2, h, f, C)


def field(v_hat, h, w):
    """The inverse of `spectrum`: (B, h, w, C)."""
    if v_hat.is_complex():
        return torch.fft.irfft2(v_hat, s=(h, w)).movedim(1, -1)
    B, _, _, f, C = v_hat.shape
    along_w, along_h = fourier_matrices(h, w, v_hat.dtype)
    weights = column_weights(h, w, v_hat).repeat(2)
    v = torch.bmm(along_h.T.expand(B, -1, -1), v_hat.reshape(B, 2 * h, f * C)).view(B * h, 2 * f, C)
    return torch.bmm((along_w.T * weights).expand(B * h, -1, -1), v).view(B, h, w, C)


def multiply(symbol, v_hat):
    """The complex product."""
    if v_hat.is_complex():
        return _as_complex(symbol) * v_hat
    real, imag = symbol.unbind(-4)
    product = real.unsqueeze(-4) * v_hat
    product.select(1, 0).addcmul_(v_hat.select(1, 1), imag, value=-1)
    product.select(1, 1).addcmul_(v_hat.select(1, 0), imag)
    return product


def correlate(v_hat, g_hat, weights, per_image):
    """weights conj(v_hat) g_hat as a symbol: summed over the images, or one per image."""
    if v_hat.is_complex():
        product = v_hat.conj() * g_hat
        product = weights * (product if per_image else product.sum(0))
        return torch.stack([product.real, product.imag], dim=-4).movedim(-3, -1)
    real = (v_hat * g_hat).sum(1)
    imag = v_hat[:, 0] * g_hat[:, 1] - v_hat[:, 1] * g_hat[:, 0]
    if not per_image:
        real, imag = real.sum(0), imag.sum(0)
    return weights[:, None] * torch.stack([real, imag], dim=-4)


def column_weights(h, w, like):
    """d of `Convolution`, (w // 2 + 1,), real, of the precision of `like`."""
    weights = torch.full((w // 2 + 1,), 2 / (h * w), dtype=like.real.dtype, device=like.device)
    weights[0] = 1 / (h * w)
    if w % 2 == 0:
        weights[-1] = 1 / (h * w)
    return weights


@lru_cache(maxsize=16)
def fourier_matrices(h, w, dtype):
    """The real transform along w, (2 (w // 2 + 1), w), and the complex one along h as a real matrix, (2 h, 2 h).

    The first gives real parts, then imaginary parts. The second takes pairs of them, row by row, and returns all real
    parts before all imaginary ones.
    """
    with torch.inference_mode(False), torch.device("cpu"):  # what is kept outlives the mode that the first caller is in
        along_w = torch.view_as_real(torch.fft.rfft(torch.eye(w, dtype=torch.float64)))  # (w, w // 2 + 1, 2)
        F = torch.fft.fft(torch.eye(h, dtype=torch.float64))               # symmetric, (h, h)
        along_h = torch.stack([torch.stack([F.real, -F.imag], dim=-1), torch.stack([F.imag, F.real], dim=-1)])
        return along_w.permute(2, 1, 0).reshape(-1, w).to(dtype), along_h.reshape(2 * h, 2 * h).to(dtype)


def symmetric(A):
    return (A + A.mT) / 2


class Diagonal(nn.Module):
    """Each of `dim` channels follows a PDE of its own, or, with `components`, is the sum of so many that do.

    Parameters, (dim,) unless said otherwise: g0, gx, gy; log_tau; log_lx, log_ly and shear, which give K = L L^T with
    L = [[lx, 0], [shear ly, ly]]; b (dim, 2); r = R_MAX - softplus(r_slack). So K is positive definite and r <= R_MAX
    whatever an optimiser does. Those of absent terms do not exist. With one token's width 1 / max(h, w), they start at

    - tau = 1, r = 0, g0 = 1, gx = gy = 0: a contraction that keeps the mean;
    - K isotropic, its Gaussian (variance 2 tau K) with a standard deviation that runs log-uniformly over the channels
      from half a token, the finest that the grid resolves, to 1/4, beyond which the torus looks flat: as S4 spreads
      its time scales, so that every range is there before training;
    - b tau: shifts of up to two tokens in all directions, so that first neighbours are told apart.

    With more than one component all of these are (components, dim, ...), the widths are shuffled within a component, and
    all components but the first, whose g0 is 1, have a random g0 of standard deviation 1/2: one PDE alone can only
    smooth, shift and differentiate, several make band-pass filters.

    All are plain parameters, not layers: initialisers that walk over a model's layers leave them alone.
    """

    def __init__(self, dim, groups, components, grid_size, terms):
        super().__init__()
        self.dim, self.groups, self.components, self.terms = dim, groups, components, terms
        self._symbols = {}
        self.create_parameters(1 / max(grid_size))
        self._names = tuple(self._parameters)

    def create_parameters(self, token):
        shape, log_l = (self.dim,), initial_widths(token, self.dim).log()
        self.g0 = nn.Parameter(torch.ones(shape))
        if self.components > 1:
            shape = (self.components, self.dim)
            log_l = torch.stack([log_l[torch.randperm(self.dim)] for _ in range(self.components)])
            others = torch.randn(self.components - 1, self.dim) / 2
            self.g0 = nn.Parameter(torch.cat([self.g0.detach()[None], others]))
        self.log_tau = nn.Parameter(torch.zeros(shape))
        self.create_scalar_pdes(token, log_l, r=torch.zeros(shape))

    def create_scalar_pdes(self, token, log_l, r):
        shape = log_l.shape
        self.gx = nn.Parameter(torch.zeros(shape))
        self.gy = nn.Parameter(torch.zeros(shape))
        if "diffusion" in self.terms:
            self.log_lx = nn.Parameter(log_l)
            self.log_ly = nn.Parameter(log_l.clone())
            self.shear = nn.Parameter(torch.zeros(shape))
        if "convection" in self.terms:
            self.b = nn.Parameter(initial_shifts(token, shape))
        if "reaction" in self.terms:
            self.r_slack = nn.Parameter((R_MAX - r).expm1().log())

    def coefficients(self):
        """K (..., 2, 2), b (..., 2), r (...) and tau, in float32 or wider; zero for absent terms.

        Their leading axes are (dim,) or (components, dim); where channels are coupled, (groups, c, c) with tau (groups,).
        """
        tau = _widen(self.log_tau).exp()
        shape = self.g0.shape
        K, b, r = tau.new_zeros(*shape, 2, 2), tau.new_zeros(*shape, 2), tau.new_zeros(shape)
        if "diffusion" in self.terms:
            lx, ly, shear = _widen(self.log_lx).exp(), _widen(self.log_ly).exp(), _widen(self.shear)
            Kxy = lx * shear * ly
            K = torch.stack([lx**2, Kxy, Kxy, (1 + shear**2) * ly**2], dim=-1).unflatten(-1, (2, 2))
        if "convection" in self.terms:
            b = _widen(self.b)
        if "reaction" in self.terms:
            r = R_MAX - nn.functional.softplus(_widen(self.r_slack))
        return K, b, r, tau

    def symbol(self, h, w):
        """What `evolve` multiplies by on an h x w grid: see `compute_symbol`.

        It does not depend on the input, so evaluation without gradients computes it once per grid size and reuses it
        until a parameter changes. (Writing through `parameter.data` escapes PyTorch's version counter, and so ours;
        train() or eval() afterwards drops what was kept.)
        """
        parameters = list(self._parameters.values())
        state = None
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            state = self._state(parameters)
        if state is None:
            return self.compute_symbol(h, w)
        entry = self._symbols.get((h, w))
        if entry is None or entry[0] != state:
            # The entry holds the parameters: as long as they live, no other can have their identity.
            entry = self._symbols[h, w] = state, parameters, self.compute_symbol(h, w)
            if len(self._symbols) > GRIDS_KEPT:
                self._symbols.pop(next(iter(self._symbols)))
        return entry[2]

    def _state(self, parameters):
        """What changes whenever a parameter does; None where that cannot be told."""
        if tuple(self._parameters) != self._names or any(p.is_inference() for p in parameters):
            return None  # parametrised or replicated: the values live elsewhere; inference tensors count no versions
        try:
            return [(id(p), p.data_ptr(), p._version) for p in parameters]
        except RuntimeError:  # tensors of torch.func have no address
            return None

    def compute_symbol(self, h, w, time_scale=None):
        """G(k) B(k) as its real and imaginary part, (..., 2, h, w // 2 + 1, dim)."""
        g0, gx, gy = (_widen(g)[..., None, None, :] for g in (self.g0, self.gx, self.gy))
        K, b, r, tau = self.coefficients()
        if time_scale is not None:
            tau = tau * time_scale.view(-1, *[1] * (tau.ndim - 1), self.dim)   # (B, dim) or (B, components, dim)
        K, b, r = tau[..., None, None] * K, tau[..., None] * b, tau * r    # few numbers yet, in front of many
        kx, ky, kx_odd, ky_odd = (k.unsqueeze(-1) for k in wave_vectors(h, w, K.dtype, K.device))
        growth, phase = growth_and_phase(K[..., None, None, :, :, :], b[..., None, None, :, :], r[..., None, None, :],
                                         kx, ky, kx_odd, ky_odd)           # (..., h, w // 2 + 1, dim), maybe 1 for h, w
        B_imag = gx * kx_odd + gy * ky_odd
        size = growth.exp()
        real, imag = size * phase.cos(), size * phase.sin()
        real, imag = real * g0 - imag * B_imag, real * B_imag + imag * g0
        symbol = torch.stack([real, imag], dim=-4)
        return symbol.sum(-5) if self.components > 1 else symbol

    def evolve(self, v, time_scale=None):                                  # (B, h, w, dim), (B, dim) or None
        """From R u to the state at time tau; time_scale multiplies tau."""
        h, w = v.shape[1:3]
        symbol = self.symbol(h, w) if time_scale is None else self.compute_symbol(h, w, time_scale)
        return convolve(v, symbol)

    def kernel(self, h, w):
        return torch.fft.irfft2(green_symbol(*self.coefficients(), h, w), s=(h, w))

    # What could make a kept symbol stale without a new parameter version: new storage, a new mode, a copy.
    def _apply(self, fn, recurse=True):
        self._symbols.clear()
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        self._symbols.clear()
        return super().train(mode)

    def __getstate__(self):
        return {**super().__getstate__(), "_symbols": {}}


class Pairwise(Diagonal):
    """Every pair of channels of a group has a PDE, whose Green's function takes the one to the other: Algorithm 1.

    With c = dim / groups channels in a group, g0, gx, gy and the parameters of K, b and r are those of `Diagonal` with
    the shape (groups, c, c), output channels before input channels; log_tau is (groups,). The exponential is taken
    entry by entry: h_i = sum_j G_ij * (B R u)_j, like a convolution of as many channels, in O(N c dim).

    A pair of a channel with itself starts as in `Diagonal`. Between two channels r starts at -log c, so that a channel
    hears all the others together about as loud as itself; without the reaction term g0 starts at 1 / c instead of 1.
    """

    def create_parameters(self, token):
        c = self.dim // self.groups
        shape, own = (self.groups, c, c), torch.eye(c).expand(self.groups, c, c)
        self.g0 = nn.Parameter(own / (1 if "reaction" in self.terms else c))
        self.log_tau = nn.Parameter(torch.zeros(self.groups))
        log_l = initial_widths(token, math.prod(shape)).log().view(shape)
        self.create_scalar_pdes(token, log_l, r=math.log(c) * (own - 1))

    def green(self, K, b, r, tau, *k):
        """The symbol as matrices, (f, groups, c, c), at f wave vectors."""
        k = (component[:, None, None, None] for component in k)
        return self.exponential(*growth_and_phase(K, b, r, *k), tau[:, None, None])

    def exponential(self, growth, phase, tau):                             # (f, groups, c, c), same, (groups, 1, 1)
        return torch.polar(torch.exp(tau * growth), tau * phase)

    def compute_symbol(self, h, w):
        """G(k) at all wave vectors, (h (w // 2 + 1), groups, c, c)."""
        return self.green(*self.coefficients(), *self.flat_wave_vectors(h, w))

    def flat_wave_vectors(self, h, w):
        dtype = torch.promote_types(self.g0.dtype, torch.float32)
        return [k.expand(h, w // 2 + 1).flatten() for k in wave_vectors(h, w, dtype, self.g0.device)]

    def evolve(self, v):                                                   # (B, h, w, dim)
        h, w = v.shape[1:3]
        v_hat = torch.fft.rfft2(_widen(v).movedim(-1, 1))                  # (B, dim, h, w // 2 + 1)
        embedded = self.embed(v_hat, h, w)                                 # (f, groups, c, B)
        if not torch.is_grad_enabled() and len(embedded) * self.g0.numel() <= KEPT:
            states = self.symbol(h, w) @ embedded                          # (f, groups, c, B)
        else:
            at_once, coefficients = max(1, CHUNK // self.g0.numel()), self.coefficients()
            pieces = list(zip(*(k.split(at_once) for k in (embedded, *self.flat_wave_vectors(h, w)))))
            run = self.evolve_some if len(pieces) == 1 else self.evolve_and_forget
            states = torch.cat([run(*piece, *coefficients) for piece in pieces])
        h_hat = states.permute(3, 1, 2, 0).reshape(v_hat.shape)
        return torch.fft.irfft2(h_hat, s=(h, w)).movedim(1, -1).to(v.dtype)

    def evolve_some(self, v, kx, ky, kx_odd, ky_odd, *coefficients):
        """A few wave vectors alone."""
        return self.green(*coefficients, kx, ky, kx_odd, ky_odd) @ v

    def evolve_and_forget(self, *arguments):
        """The same, but training keeps nothing of the symbol: it is computed again for the gradients."""
        return checkpoint(self.evolve_some, *arguments, use_reentrant=False, preserve_rng_state=False)

    def embed(self, v_hat, h, w):
        """B(k) v_hat with B(k) = g0 + i (gx kx + gy ky), as one real product: (f, groups, c, B)."""
        g = torch.cat([_widen(self.g0), _widen(self.gx), _widen(self.gy)], dim=1)     # (groups, 3 c, c)
        parts = torch.view_as_real(v_hat.flatten(2)).unflatten(1, (self.groups, -1))  # (B, groups, c, f, 2)
        parts = torch.einsum("gij,bgjfz->fgibz", g, parts).contiguous()               # (f, groups, 3 c, B, 2)
        v, v_x, v_y = torch.view_as_complex(parts).chunk(3, dim=2)
        _, _, kx, ky = (k[:, None, None, None] for k in self.flat_wave_vectors(h, w))
        return v + 1j * (kx * v_x + ky * v_y)

    def kernel(self, h, w):
        G = self.compute_symbol(h, w).flatten(1, 2).movedim(0, -1).unflatten(-1, (h, w // 2 + 1))
        return torch.fft.irfft2(G, s=(h, w))


class Coupled(Pairwise):
    """The channels of a group follow one system of PDEs: G(k) is the matrix exponential of tau Lambda(k).

    With c = dim / groups, matrices (groups, c, c) unless said otherwise: g0, gx, gy; log_tau (groups,); lx, ly and
    shear, of which K(k) = P P^T with P = [kx lx + ky shear, ky ly], the matrix form of the Cholesky factor of
    `Diagonal`; bx and by, of which the symmetric parts count; r = R_MAX - r_root r_root^T. K(k) is positive
    semi-definite, i k . b is anti-Hermitian and r <= R_MAX, so the 2-norm of G(k) is at most exp(tau R_MAX).
    Starts as `Diagonal` does, without coupling.
    """

    def create_parameters(self, token):
        c = self.dim // self.groups
        own = torch.eye(c).expand(self.groups, c, c)
        self.g0 = nn.Parameter(own.clone())
        self.gx = nn.Parameter(torch.zeros_like(own))
        self.gy = nn.Parameter(torch.zeros_like(own))
        self.log_tau = nn.Parameter(torch.zeros(self.groups))
        if "diffusion" in self.terms:
            l = torch.diag_embed(initial_widths(token, self.dim).view(self.groups, c))
            self.lx = nn.Parameter(l)
            self.ly = nn.Parameter(l.clone())
            self.shear = nn.Parameter(torch.zeros_like(l))
        if "convection" in self.terms:
            bx, by = initial_shifts(token, (self.groups, c)).unbind(-1)
            self.bx = nn.Parameter(torch.diag_embed(bx))
            self.by = nn.Parameter(torch.diag_embed(by))
        if "reaction" in self.terms:
            self.r_root = nn.Parameter(math.sqrt(R_MAX) * own)

    def coefficients(self):
        tau = _widen(self.log_tau).exp()
        shape = self.g0.shape
        K, b, r = tau.new_zeros(*shape, 2, 2), tau.new_zeros(*shape, 2), tau.new_zeros(shape)
        if "diffusion" in self.terms:
            lx, ly, shear = _widen(self.lx), _widen(self.ly), _widen(self.shear)
            Kxy = symmetric(lx @ shear.mT)
            K = torch.stack([lx @ lx.mT, Kxy, Kxy, shear @ shear.mT + ly @ ly.mT], dim=-1).unflatten(-1, (2, 2))
        if "convection" in self.terms:
            b = torch.stack([symmetric(_widen(self.bx)), symmetric(_widen(self.by))], dim=-1)
        if "reaction" in self.terms:
            root = _widen(self.r_root)
            r = R_MAX * torch.eye(shape[-1], dtype=root.dtype, device=root.device) - root @ root.mT
        return K, b, r, tau

    def exponential(self, growth, phase, tau):
        return torch.linalg.matrix_exp(tau * torch.complex(*torch.broadcast_tensors(growth, phase)))


EQUATIONS = {"diagonal": Diagonal, "pairwise": Pairwise, "coupled": Coupled}
COUPLINGS = tuple(EQUATIONS)


class PDESSM(nn.Module):
    """The PDE-SSM operator: (B, dim, h, w) -> (B, dim, h, w), for any h and w.

    grid_size:   (h, w) of the tokens it will see; only the initial values depend on it.
    coupling:    "diagonal", "pairwise" or "coupled": which channels share a PDE; see `Diagonal`, `Pairwise`, `Coupled`.
    groups:      into how many groups the channels of the last two fall, as attention's into heads. By default 1 for
                 pairwise, as in the paper, and groups of 8 channels for coupled, whose exponential costs O(c^3).
    state_dim:   channels of the PDE, if not `dim`; a linear layer then leads back. `expand` gives it in multiples of dim.
    terms:       which of "diffusion", "convection", "reaction" the PDE has; an absent term has no parameters.
    components:  not the paper's: so many PDEs per channel, whose states are summed. For the diagonal coupling alone.
    activation:  not the paper's: silu(R u + bias) in place of R u.
    gate:        not the paper's: the state times silu of a second projection of u, then a linear layer.
    conditioned: not the paper's: forward takes a vector c (B, dim) too, and each channel's tau is multiplied by exp of
                 a linear map of it, zero at the start and bounded to +-2. For the diagonal coupling alone.

    R is a linear layer (a 1 x 1 convolution). Transform and symbol are computed in float32 (float64 for
    float64 inputs) under any autocast; the result has the type of R u. ValueError for options that do not fit.
    """

    def __init__(
        self, dim, *, grid_size=(16, 16), coupling="diagonal", groups=None, state_dim=None, expand=1.0, terms=TERMS,
        components=1, activation=False, gate=False, conditioned=False,
    ):  # fmt: skip
        super().__init__()
        if coupling not in EQUATIONS:
            raise ValueError(f"unknown coupling {coupling!r}; known: {', '.join(EQUATIONS)}")
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, not {terms!r}")
        if conditioned and coupling != "diagonal":
            raise ValueError(f"conditioned needs coupling='diagonal'; {coupling!r} has too large a symbol for one per image")
        if components < 1 or (components > 1 and coupling != "diagonal"):
            raise ValueError(f"components is {components}, with coupling {coupling!r}; it is 1, or more if diagonal")
        C = round(expand * dim) if state_dim is None else state_dim
        if groups is None:
            groups = C // math.gcd(C, 8) if coupling == "coupled" else 1
        if groups < 1 or C < 1 or C % groups:
            raise ValueError(f"{C} channels cannot be split into {groups} equal groups")
        self.dim, self.coupling, self.conditioned = dim, coupling, conditioned
        self.activation = activation
        self.R = nn.Linear(dim, C, bias=activation)
        terms = tuple(term for term in TERMS if term in terms)
        self.equation = EQUATIONS[coupling](C, groups, components, grid_size, terms)
        self.gate = nn.Linear(dim, C, bias=False) if gate else None
        self.out = nn.Linear(C, dim, bias=False) if gate or dim != C else None
        for layer in filter(None, (self.R, self.gate, self.out)):
            nn.init.xavier_uniform_(layer.weight)
        if activation:
            nn.init.zeros_(self.R.bias)
        if conditioned:
            self.log_time_scale = nn.Parameter(torch.zeros(C, dim))

    def forward(self, u, c=None):                                          # (B, D, h, w), (B, D) or None
        if u.ndim != 4 or u.shape[1] != self.dim or not u.is_floating_point():
            raise ValueError(f"PDESSM needs a real (B, {self.dim}, h, w); it got {u.dtype} of shape {tuple(u.shape)}")
        if (c is not None) != self.conditioned:
            raise ValueError(f"PDESSM has conditioned={self.conditioned} and got {'no vector' if c is None else 'a vector'} c")
        if c is not None and (c.ndim != 2 or c.shape[0] != u.shape[0] or c.shape[1] != self.dim):
            raise ValueError(f"c is {tuple(c.shape)}, not one vector per image, {(len(u), self.dim)}")
        u = u.movedim(1, -1)                                               # (B, h, w, D)
        v = self.R(u)                                                      # (B, h, w, C)
        if self.activation:
            v = nn.functional.silu(v)
        with _full_precision(u):
            options = {"time_scale": self.time_scale(c)} if self.conditioned else {}
            state = self.equation.evolve(v, **options)                     # (B, h, w, C)
        if self.gate is not None:
            state = state * nn.functional.silu(self.gate(u))               # (B, h, w, C)
        if self.out is not None:
            state = self.out(state)                                        # (B, h, w, D)
        return state.movedim(-1, 1)                                        # (B, D, h, w)

    def time_scale(self, c):                                               # (B, D)
        return (2 * torch.tanh(_widen(c) @ _widen(self.log_time_scale).T / 2)).exp()   # (B, C), from e^-2 to e^2

    def coefficients(self):
        """K, b, r and tau of the PDE; see `Diagonal.coefficients`."""
        with _full_precision(self.R.weight):
            return self.equation.coefficients()

    def kernel(self, h, w):
        """The Green's function in space, real: what a unit impulse at token (0, 0) has become at time tau, without R and B.

        (C, h, w) for the diagonal coupling, (components, C, h, w) if there are several. For the others
        (C, C / groups, h, w), output channels before input channels, as the weight of a grouped, circular convolution.
        """
        with _full_precision(self.R.weight):
            return self.equation.kernel(h, w)

    def extra_repr(self):
        equation = self.equation
        shape = f"groups={equation.groups}, components={equation.components}"
        return f"{self.dim}, coupling={self.coupling!r}, {shape}, terms={equation.terms}"


def receptive_field(kernel):
    """How far a token sees, in tokens: the root mean square of the distance on the torus, weighted by |kernel|.

    kernel (..., h, w), as of `PDESSM.kernel` -> (...). For convection alone it is the length of the shift, for
    isotropic diffusion of standard deviation s it is sqrt(2) s.
    """
    h, w = kernel.shape[-2:]
    y, x = (n * torch.fft.fftfreq(n, dtype=kernel.dtype, device=kernel.device) for n in (h, w))
    weight = kernel.abs()
    return ((weight * (x**2 + y[:, None] ** 2)).sum((-2, -1)) / weight.sum((-2, -1))).sqrt()


class PDESSMBlock(nn.Module):
    """PDE-SSM on tokens, (B, N, D) -> (B, N, D): stands where timm's Attention stood and takes its arguments.

    num_heads, qkv_bias and most other arguments of attention mean nothing to a PDE and are ignored; device and dtype are
    those of the parameters, and dim_out, if given, must be dim.
    grid_size is the (h, w) of the h w tokens of the grid, row by row; without it, their number must be a square.
    The other options are those of `PDESSM`.

    prefix_tokens is the number of tokens before the grid's that have no place on it, such as a class token. To them the
    torus is one well-stirred vessel: each is a uniform field, which diffusion and convection leave as it is, so their
    mean after a linear layer is added to every token of the grid, and the mean of the grid's result to each of them.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, *, grid_size=None, prefix_tokens=0, coupling="diagonal",
                 groups=None, state_dim=None, expand=1.0, terms=TERMS, components=1, activation=False, gate=False,
                 conditioned=False, dim_out=None, device=None, dtype=None, **ignored):  # fmt: skip
        super().__init__()
        if dim_out not in (None, dim):
            raise ValueError(f"dim_out={dim_out}: PDESSMBlock returns as many channels as it gets, {dim}")
        if unknown := set(ignored) - _ATTENTION_ARGUMENTS:
            raise TypeError(f"PDESSMBlock has no option {', '.join(sorted(unknown))}")
        self.grid_size, self.prefix_tokens = tuple(grid_size) if grid_size else None, prefix_tokens
        self.pde = PDESSM(
            dim, grid_size=self.grid_size or (16, 16), coupling=coupling, groups=groups, state_dim=state_dim,
            expand=expand, terms=terms, components=components, activation=activation, gate=gate, conditioned=conditioned,
        )  # fmt: skip
        self.conditioned = conditioned
        self.prefix = nn.Linear(dim, dim, bias=False) if prefix_tokens else None
        self.to(device=device, dtype=dtype)

    def forward(self, tokens, c=None, **call):                             # (B, P + N, D), (B, D) or None
        """`call` is what callers pass to attention: rope is ignored, since a PDE knows where tokens are; a mask, a context
        or anything else but None and False is a ValueError."""
        if given := [name for name, value in call.items() if value is not None and value is not False and name != "rope"]:
            raise ValueError(f"PDESSMBlock mixes a grid of tokens and cannot follow {', '.join(given)}")
        if tokens.ndim != 3:
            raise ValueError(f"PDESSMBlock needs tokens (B, N, {self.pde.dim}); it got the shape {tuple(tokens.shape)}")
        prefix, tokens = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        N = tokens.shape[1]
        h, w = self.grid_size or (math.isqrt(N), math.isqrt(N))
        if N == 0 or h * w != N:
            grid = f"{h} x {w} = {h * w} tokens" if self.grid_size else "a square number of tokens (pass grid_size=(h, w))"
            prefix = f" after {self.prefix_tokens} prefix_tokens" if self.prefix_tokens else ""
            raise ValueError(f"PDESSMBlock got {N} tokens on the grid{prefix}; it expects {grid}")
        u = tokens.transpose(1, 2).unflatten(2, (h, w))                    # (B, D, h, w)
        mixed = self.pde(u, c).flatten(2).transpose(1, 2)                  # (B, N, D)
        if self.prefix is None:
            return mixed
        uniform = self.prefix(prefix)                                      # (B, P, D)
        return torch.cat([uniform + mixed.mean(1, keepdim=True), mixed + uniform.mean(1, keepdim=True)], dim=1)


# What makes a mixer of PDESSMBlock, by name. The first is the paper's. The second is ours, with at most as many parameters
# as attention from 88 channels on: 3.5 D^2 + 48 D against 4 D^2 + 4 D.
PRESETS = {
    "pdessm": {},
    "pdessm-g": {"gate": True, "activation": True, "components": 4, "expand": 7 / 6},
}


def options_from_weights(weights):
    """The options of the PDESSMBlock without prefix tokens that has these weights, a state dict: build it, then load them.

    KeyError if the weights are not those of a PDESSMBlock.
    """
    g0 = weights["pde.equation.g0"]
    names = {name.removeprefix("pde.equation.") for name in weights}
    found = {
        "diffusion": names & {"log_lx", "lx"},
        "convection": names & {"b", "bx"},
        "reaction": names & {"r_slack", "r_root"},
    }
    state_dim, dim = weights["pde.R.weight"].shape
    return {
        "coupling": "diagonal" if g0.ndim < 3 else "coupled" if names & {"lx", "bx", "r_root"} else "pairwise",
        "groups": len(g0) if g0.ndim == 3 else 1,
        "state_dim": state_dim if state_dim != dim else None,
        "terms": tuple(term for term in TERMS if found[term]),
        "components": len(g0) if g0.ndim == 2 else 1,
        "activation": "pde.R.bias" in weights,
        "gate": "pde.gate.weight" in weights,
        "conditioned": "pde.log_time_scale" in weights,
    }


def replace_attention(model, mixer="pdessm", grid_size=None, **options):
    """Replaces every self-attention layer of `model` by a PDESSMBlock, in place, prints how many, and returns the model.

    model:     anything with global self-attention as timm has it (`qkv`, `proj`, `num_heads`: timm's ViTs, DiT, SiT) or
               as diffusers has it (`to_q`, `to_k`, `to_v`, `to_out`). Cross-attention and attention in windows stay.
    mixer:     a name in PRESETS, or a class with the constructor of PDESSMBlock.
    grid_size: (h, w) of the tokens; by default the model's, if it has a `grid_size` or its `patch_embed` has one. For
               other inputs later, set `grid_size` of the blocks.
    options:   of PDESSMBlock; prefix_tokens is by default the model's `num_prefix_tokens`.

    The new layers have new weights, on the device and of the type of the old. ValueError if there is no such layer.
    """
    if isinstance(mixer, str):
        if mixer not in PRESETS:
            raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(PRESETS)}")
        mixer, options = PDESSMBlock, PRESETS[mixer] | options
    if options.get("conditioned"):
        raise ValueError("conditioned needs blocks that pass a conditioning vector to their mixer, as DiT of this project does")
    options.setdefault("prefix_tokens", getattr(model, "num_prefix_tokens", 0))
    for owner in (model, getattr(model, "patch_embed", None)):
        grid_size = grid_size or getattr(owner, "grid_size", None)

    replacements = {}
    for layer in model.modules():
        if dim := _attention_width(layer):
            weight = next(layer.parameters())
            new = mixer(dim, grid_size=grid_size, **options).to(weight.device, weight.dtype)
            replacements[layer] = new.train(layer.training)
    if not replacements:
        parts = "qkv and proj, or to_q, to_k, to_v and to_out"
        raise ValueError(f"{type(model).__name__} has no self-attention layer with {parts}")
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in replacements:
            model.set_submodule(name, replacements[layer])
    print(f"replaced {len(replacements)} attention layers of {type(model).__name__} by {getattr(mixer, '__name__', mixer)}")
    return model


def _attention_width(layer):
    """The channels of a global self-attention layer, timm's or diffusers'; 0 for any other module."""
    if isinstance(getattr(layer, "qkv", None), nn.Linear) and hasattr(layer, "proj") and hasattr(layer, "num_heads"):
        in_windows = hasattr(layer, "window_size") or hasattr(layer, "relative_position_bias_table")
        return 0 if in_windows else layer.qkv.in_features
    if all(hasattr(layer, name) for name in ("to_q", "to_k", "to_v", "to_out")) and not layer.is_cross_attention:
        return layer.to_q.in_features
    return 0


_backend = "torch"


def set_backend(name):
    """What runs the diagonal coupling, if not conditioned: "torch"; "triton", the kernels of pde_ssm_triton.py, or an error
    where they cannot; or "auto", the kernels where they can: on GPUs, up to 32 x 32 tokens. Results agree up to rounding."""
    global _backend
    if name not in ("torch", "triton", "auto"):
        raise ValueError(f"unknown backend {name!r}; known: torch, triton, auto")
    _backend = name


def _kernels(v):
    """The module pde_ssm_triton if it is to evolve v (B, h, w, C)."""
    if _backend == "torch":
        return None
    try:
        import pde_ssm_triton
    except ImportError:
        pde_ssm_triton = None
    if pde_ssm_triton and pde_ssm_triton.serves(v):
        return pde_ssm_triton
    if _backend == "triton":
        where = "not installed" if pde_ssm_triton is None else f"not for {v.dtype} of shape {tuple(v.shape)} on {v.device.type}"
        raise ValueError(f"the backend is triton, and its kernels are {where}; set_backend('auto') takes torch there")
    return None


def _full_precision(x):
    """A context without autocast on the device of x; the meta device has none."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
