"""Flow matching on packed latents: time, noise, path and loss, all drawn from the crystals' keys.

After ADiT and CrysLDNet (paper 3.3, Alg. 1; times, weight and centring as in the released code,
with the noise centred over the atoms that exist). The denoiser predicts the clean latents Z1 from
Zt = (1−t)·Z0 + t·Z1.

Letters in shapes: A atoms, B crystals, D latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from crysforge.models.ops.keyed_random import derive, keyed_normal, keyed_uniform, member_keys
from crysforge.models.ops.segments import crystal_mean

T_MIN = 0.01
T_CLAMP = 0.9
"""Times above this weigh like this one: the weight 1/(1−t)² stays below 100."""

_TIME, _NOISE = 0x71, 0x72  # salts


def flow_times(key: Tensor) -> Tensor:
    """One time per crystal, uniform in [0.01, 0.99), fp32 [B], from the crystals' keys [B]."""
    return T_MIN + (1 - 2 * T_MIN) * keyed_uniform(key, 1, _TIME)[:, 0]


def centred_noise(key: Tensor, batch: Tensor, ptr: Tensor, dim: int) -> Tensor:
    """Standard normal noise minus its mean over the atoms of each crystal, fp32 [A, dim].

    A crystal of one atom has none left."""
    noise = keyed_normal(member_keys(derive(key, _NOISE), batch, ptr), dim, 0)
    return noise - crystal_mean(noise, ptr)[batch]


def flow_losses(
    denoiser: Callable[..., Tensor],
    z1: Tensor,
    key: Tensor,
    batch: Tensor,
    ptr: Tensor,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of every crystal at its own time.

    Gradient flows into z1 both as the target and through Zt; detach it to hold the latents fixed.

    Args:
        denoiser: (Zt [A, D], t [B], batch, ptr, sizes) → prediction of Z1 [A, D].
        z1: [A, D] clean latents.
        key: [B] crystals' keys. batch: [A]. ptr: [B+1]. sizes: atoms of each crystal, if known on
            the host.

    Returns:
        Losses [B]: mean over atoms and channels of ((Z1 − Ẑ1)/(1 − min(t, 0.9)))², and the times
        [B], both fp32.
    """
    z1 = z1.float()
    t = flow_times(key)
    noise = centred_noise(key, batch, ptr, z1.shape[1])
    at = t[batch, None]
    prediction = denoiser((1 - at) * noise + at * z1, t, batch, ptr, sizes).float()
    error = (z1 - prediction).square().mean(dim=1, keepdim=True)
    return crystal_mean(error, ptr)[:, 0] / (1 - t.clamp(max=T_CLAMP)).square(), t
