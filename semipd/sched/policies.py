"""From a policy's arguments to the policy."""

from __future__ import annotations

from collections.abc import Sequence

from semipd.config import (
    SLO,
    AdaptivePolicy,
    CadencePolicy,
    ExclusivePolicy,
    MixedPolicy,
    PolicyConfig,
    ReleasedSemiPDPolicy,
    SemiPDPolicy,
    StaticPolicy,
)
from semipd.errors import ConfigError
from semipd.sched.adaptive import Adaptive
from semipd.sched.allowance import GAP_WITHOUT_TARGET
from semipd.sched.baselines import Cadence, Exclusive, Mixed, ModelledMixed, Static
from semipd.sched.latency import LatencyModel
from semipd.sched.policy import Policy
from semipd.sched.semi_pd import SemiPD, Shares
from semipd.sched.semi_pd_released import ReleasedSemiPD

_SEMI_PD_TTFT, _SEMI_PD_TPOT = 0.5, 0.1  # seconds: what semi-PD's released code aims at unless told otherwise


def make_policy(
    config: PolicyConfig,
    *,
    num_sms: int,
    splits: Sequence[tuple[int, int]],
    default_split: tuple[int, int] | None,
    max_prefill_tokens: int,
    slo: SLO | None,
    latency: LatencyModel,
) -> Policy:
    """The policy that `config` describes, on a device that offers `splits`.

    A device that cannot be split at all runs `StaticPolicy()` as prefill first.

    Args:
        config: the policy's own arguments.
        num_sms: of the device.
        splits: (prefill, decode) shares that it offers.
        default_split: that of `StaticPolicy()`.
        max_prefill_tokens: most prompt tokens of a step.
        slo: the engine's.
        latency: the model of step times that the scheduler teaches.

    Raises:
        ConfigError: the split asked for is not offered; the message lists those that are.
    """
    match config:
        case AdaptivePolicy():
            return Adaptive(num_sms=num_sms, splits=splits, max_tokens=max_prefill_tokens, latency=latency)
        case ExclusivePolicy():
            return Exclusive(num_sms)
        case CadencePolicy(decode_steps=decode_steps):
            return Cadence(num_sms, decode_steps)
        case MixedPolicy(token_budget=None):
            targets = () if slo is None else (slo.gap, slo.tpot)
            limit = min((target for target in targets if target is not None), default=GAP_WITHOUT_TARGET)
            return ModelledMixed(num_sms, max_prefill_tokens, limit, latency)
        case MixedPolicy(token_budget=int(token_budget)):
            return Mixed(num_sms, token_budget)
        case StaticPolicy(prefill_sms=None):
            return Exclusive(num_sms) if default_split is None else Static(num_sms, default_split)
        case StaticPolicy(prefill_sms=int(prefill_sms), decode_sms=int(decode_sms)):
            split = (prefill_sms, decode_sms)
            if split not in splits:
                offered = ", ".join(map(str, splits)) or "none: the device cannot be split"
                raise ConfigError(f"the split (prefill, decode) is {split}; this device of {num_sms} offers {offered}")
            return Static(num_sms, split)
        case SemiPDPolicy():
            return SemiPD(Shares(num_sms, splits), config, **_semi_pd_targets(slo))
        case ReleasedSemiPDPolicy():
            return ReleasedSemiPD(Shares(num_sms, splits), **_semi_pd_targets(slo))
    raise AssertionError(config)


def predicted_splits(policy: Policy) -> tuple[tuple[int, int], ...] | None:
    """The splits whose step times the policy predicts, beside those of the whole device; None if it predicts none."""
    match policy:
        case Adaptive():
            return policy.splits
        case ModelledMixed():
            return ()
    return None


def _semi_pd_targets(slo: SLO | None) -> dict[str, float]:
    slo = slo or SLO()
    return {"ttft": slo.ttft or _SEMI_PD_TTFT, "tpot": slo.tpot or _SEMI_PD_TPOT}
