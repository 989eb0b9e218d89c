"""PDE-SSM: token mixing by a learnable convection-diffusion-reaction equation, solved in the Fourier domain.

On a grid of h x w tokens, seen as the unit torus, every channel of the hidden state follows

    dh/dt = div(K grad h) + b . grad h + r h,     h(0) = (g0 + gx d/dx + gy d/dy) (R u)          (2), (6)

up to time tau. A Fourier mode with wave vector k = 2 pi (m_x, m_y) is multiplied by G(k) B(k), so that

    h = irfft2( G(k) B(k) rfft2(R u) ),     G(k) = exp(tau Lambda(k)),     B(k) = g0 + i (gx kx + gy ky)

costs O(N log N). Equation numbers are those of the PDE-SSM paper. x runs along the width and y along the height:
tensors are (..., h, w), so x is their last axis, while pairs of coefficients are in the order (x, y).
This file needs nothing but torch.
"""

import math

import torch
from torch import nn

TERMS = ("diffusion", "convection", "reaction")
COUPLINGS = ("diagonal",)
R_MAX = 1.0  # r <= R_MAX, so no mode of any channel grows by more than exp(tau R_MAX)

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


def green_symbol(K, b, r, tau, h, w):
    """The Green's function in the Fourier domain, Eq. (10): G(k) = exp(tau Lambda(k)) with

        Lambda(k) = -(Kxx kx^2 + 2 Kxy kx ky + Kyy ky^2) + r + i (bx kx + by ky)                            (8)

    K (..., 2, 2), b (..., 2), r (...) and tau (...) broadcast over their leading axes and are in units of the torus
    (side 1, whatever h and w). Returns (..., h, w // 2 + 1), complex64, or complex128 for float64 coefficients.
    """
    ky, ky_odd = (k[:, None] for k in wave_numbers(h, dtype=K.dtype, device=K.device))
    kx, kx_odd = wave_numbers(w, half=True, dtype=K.dtype, device=K.device)
    Kxx, Kxy, Kyy = (K[..., i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    bx, by = b[..., 0, None, None], b[..., 1, None, None]
    r, tau = r[..., None, None], tau[..., None, None]
    growth = r - Kxx * kx**2 - 2 * Kxy * kx_odd * ky_odd - Kyy * ky**2
    phase = bx * kx_odd + by * ky_odd
    return torch.polar(*torch.broadcast_tensors(torch.exp(tau * growth), tau * phase))


def embedding_symbol(g0, gx, gy, h, w):
    """The embedding of the input in the Fourier domain, Eq. (6): B(k) = g0 + i (gx kx + gy ky).

    g0, gx, gy (...) -> (..., h, w // 2 + 1), complex.
    """
    _, ky = wave_numbers(h, dtype=g0.dtype, device=g0.device)
    _, kx = wave_numbers(w, half=True, dtype=g0.dtype, device=g0.device)
    g0, gx, gy = (g[..., None, None] for g in (g0, gx, gy))
    return torch.complex(*torch.broadcast_tensors(g0, gx * kx + gy * ky[:, None]))


class PDESSM(nn.Module):
    """The PDE-SSM operator: (B, C, h, w) -> (B, C, h, w), for any h and w.

    dim:        channels C.
    grid_size:  (h, w) of the tokens it will see; only the initial values depend on it.
    coupling:   "diagonal", each channel a PDE of its own.
    terms:      which of "diffusion", "convection", "reaction" the PDE has; an absent term has no parameters.

    Parameters, one number per channel each: g0, gx, gy of Eq. (6); log_tau; log_lx, log_ly and shear, which give
    K = L L^T with L = [[lx, 0], [shear ly, ly]]; b; and r = R_MAX - softplus(r_slack). So K is positive definite and
    r <= R_MAX whatever an optimiser does. With one token's width 1 / max(h, w), they start at

    - tau = 1, r = 0, g0 = 1, gx = gy = 0: a contraction that keeps the mean;
    - K isotropic, its Gaussian (variance 2 tau K) with a standard deviation that runs log-uniformly over the channels
      from half a token, the finest that the grid resolves, to 1/4, beyond which the torus looks flat: as S4 spreads
      its time scales, so that every range is there before training;
    - b tau: shifts of up to two tokens in all directions, so that first neighbours are told apart.

    R is a linear layer without bias (a 1 x 1 convolution). Transform and symbol are computed in float32 (float64 for
    float64 inputs) under any autocast; the result has the type of R u.
    """

    def __init__(self, dim, *, grid_size=(16, 16), coupling="diagonal", terms=TERMS):
        super().__init__()
        if coupling not in COUPLINGS:
            raise ValueError(f"unknown coupling {coupling!r}; known: {', '.join(COUPLINGS)}")
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, not {terms!r}")
        self.dim, self.coupling, self.terms = dim, coupling, tuple(t for t in TERMS if t in terms)
        self.R = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.R.weight)

        # Plain parameters, not layers: initialisers that walk over a model's layers leave them alone.
        token = 1 / max(grid_size)
        self.g0 = nn.Parameter(torch.ones(dim))
        self.gx = nn.Parameter(torch.zeros(dim))
        self.gy = nn.Parameter(torch.zeros(dim))
        self.log_tau = nn.Parameter(torch.zeros(dim))
        if "diffusion" in terms:
            finest, widest = math.log(token / 2), math.log(max(1 / 4, token / 2))
            log_l = torch.linspace(finest, widest, dim) - math.log(2) / 2  # variance 2 tau K = 2 l^2
            self.log_lx = nn.Parameter(log_l)
            self.log_ly = nn.Parameter(log_l.clone())
            self.shear = nn.Parameter(torch.zeros(dim))
        if "convection" in terms:
            angle, shift = 2 * math.pi * torch.rand(dim), 2 * token * torch.rand(dim)
            self.b = nn.Parameter(torch.stack([shift * angle.cos(), shift * angle.sin()], dim=-1))
        if "reaction" in terms:
            self.r_slack = nn.Parameter(torch.full((dim,), math.log(math.expm1(R_MAX))))
        self._symbols = {}

    def coefficients(self):
        """K (C, 2, 2), b (C, 2), r (C,), tau (C,) of the PDE, in float32 or wider; zero for absent terms."""
        tau = _widen(self.log_tau).exp()
        K, b, r = tau.new_zeros(self.dim, 2, 2), tau.new_zeros(self.dim, 2), tau.new_zeros(self.dim)
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
        """G(k) B(k) on an h x w grid: (C, h, w // 2 + 1), complex.

        It does not depend on the input, so evaluation without gradients computes it once per grid size and reuses it
        until a parameter changes. (Writing through `parameter.data` escapes PyTorch's version counter, and so ours;
        train() or eval() afterwards drops what was kept.)
        """
        parameters = list(self._parameters.values())
        reusable = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not reusable or any(p.is_inference() for p in parameters):  # inference tensors count no versions
            return self._symbol(h, w)
        # Parameters are compared by identity: the entry holds them, so that no later one can take their place in memory.
        state = [(id(p), p.data_ptr(), p._version) for p in parameters]
        entry = self._symbols.get((h, w))
        if entry is None or entry[0] != state:
            entry = self._symbols[h, w] = state, parameters, self._symbol(h, w)
        return entry[2]

    def _symbol(self, h, w):
        g0, gx, gy = _widen(self.g0), _widen(self.gx), _widen(self.gy)
        return green_symbol(*self.coefficients(), h, w) * embedding_symbol(g0, gx, gy, h, w)

    def kernel(self, h, w):
        """The Green's function in space: (C, h, w), real; what a unit impulse at token (0, 0) has become at time tau."""
        return torch.fft.irfft2(green_symbol(*self.coefficients(), h, w), s=(h, w))

    def forward(self, u):                                                  # (B, C, h, w)
        h, w = u.shape[-2:]
        v = self.R(u.movedim(1, -1)).movedim(-1, 1)                        # (B, C, h, w)
        v_hat = torch.fft.rfft2(_widen(v))                                 # (B, C, h, w // 2 + 1)
        return torch.fft.irfft2(self.symbol(h, w) * v_hat, s=(h, w)).to(v.dtype)

    # What could make a kept symbol stale without a new parameter version: new storage, a new mode, a copy.
    def _apply(self, fn, recurse=True):
        self._symbols.clear()
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        self._symbols.clear()
        return super().train(mode)

    def __getstate__(self):
        return {**super().__getstate__(), "_symbols": {}}

    def extra_repr(self):
        return f"{self.dim}, coupling={self.coupling!r}, terms={self.terms}"


class PDESSMBlock(nn.Module):
    """PDE-SSM on tokens, (B, N, D) -> (B, N, D): stands where timm's Attention stood and takes its arguments.

    num_heads, qkv_bias and the other arguments of attention mean nothing to a PDE and are ignored.
    grid_size is the (h, w) of the N = h w tokens, row by row; without it, N must be a square. The other options are
    those of `PDESSM`.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, *, grid_size=None, coupling="diagonal", terms=TERMS, **ignored):
        super().__init__()
        if unknown := set(ignored) - _ATTENTION_ARGUMENTS:
            raise TypeError(f"PDESSMBlock has no option {', '.join(sorted(unknown))}")
        self.grid_size = tuple(grid_size) if grid_size else None
        options = {"grid_size": self.grid_size} if grid_size else {}
        self.pde = PDESSM(dim, coupling=coupling, terms=terms, **options)

    def forward(self, tokens):                                             # (B, N, D)
        N = tokens.shape[1]
        h, w = self.grid_size or (math.isqrt(N), math.isqrt(N))
        if h * w != N:
            grid = f"{h} x {w} = {h * w} tokens" if self.grid_size else "a square number of tokens (pass grid_size=(h, w))"
            raise ValueError(f"PDESSMBlock got {N} tokens; it expects {grid}")
        u = tokens.transpose(1, 2).unflatten(2, (h, w))                    # (B, D, h, w)
        return self.pde(u).flatten(2).transpose(1, 2)                      # (B, N, D)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
