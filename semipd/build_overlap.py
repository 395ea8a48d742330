"""Whether a model's row-parallel products overlap with their collectives on a GPU, and by which plans.

That is so on Hopper GPUs, in 16 bits and among several ranks, unless `calibrate=False`. Should a plan give a wrong
result, which all ranks agree on, every product is followed by its collective. What fails on one rank alone ends the
start: the others would wait for it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from semipd.cache_file import cache_folder
from semipd.config import EngineConfig, Phase, Shard
from semipd.device.green_context import PlainStreamBackend
from semipd.kernels.ops import StepContext, create_ops
from semipd.kernels.triton_util import is_hopper
from semipd.model.lane_memory import LaneBuffers
from semipd.model.spec import ModelSpec
from semipd.parallel.overlap import ALONE_CTAS, BESIDE_CTAS, Release
from semipd.parallel.overlapped_product import OverlappedProducts
from semipd.parallel.peer_copies import PeerCopies, connect_copies
from semipd.parallel.plan_store import PlanStore
from semipd.parallel.planner import FixedPlans, ProductTuner, WrongPlan, find_plans, problems_of
from semipd.parallel.plans import SEQUENCE, Collective, Plan, Problem

if TYPE_CHECKING:  # it imports torch.distributed
    from semipd.parallel.group import TensorGroup

logger = logging.getLogger(__name__)


class Overlap:
    """What the products of one rank need to overlap; made by `agree_to_overlap`.

    Attributes:
        release: ends the waits of all products.
    """

    def __init__(
        self,
        config: EngineConfig,
        own: ModelSpec,
        group: TensorGroup,
        is_on_one_host: bool,
        max_rows: int,
        backend: PlainStreamBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._own, self._group, self._is_on_one_host = config, own, group, is_on_one_host
        self._max_rows = max_rows
        self._backend, self._device, self._dtype = backend, device, dtype
        self._copies: dict[Phase, PeerCopies] = {}
        self._beside_ctas: tuple[int, ...] = ()
        self.release = Release(device)
        group.call_on_abort(self.release.set)

    def connect(self) -> OverlappedProducts:
        """Connect the group, with all that overlap needs; what makes the products of a decoder."""
        if self._is_on_one_host:
            self._connect_copies()
        if not self._copies:  # which no plan with collectives beside a product was faster than
            self._beside_ctas = BESIDE_CTAS
        self._group.connect(self._device, beside_ctas=self._beside_ctas, alone_ctas=(ALONE_CTAS,))
        return self.make_products()

    def close(self) -> None:
        """Give back what the ranks share, together; no step runs any more."""
        for copies in self._copies.values():
            copies.close()
        self._copies.clear()

    def _connect_copies(self) -> None:
        """Memory of both lanes, or of none, for the other rank's rows, of as many as the longest step has."""
        for phase in Phase:
            copies = connect_copies(
                self._group.shard,
                self._group.exchange,
                self._device,
                self.release.flag,
                dim=self._own.hidden_size,
                dtype=self._dtype,
                max_rows=self._max_rows,
            )
            if copies is None:  # on all ranks
                self.close()
                break
            self._copies[phase] = copies

    def make_products(self) -> OverlappedProducts:
        """What makes the products of a decoder, with plans that are stored or tuned now.

        All ranks call it together when they are connected.
        """
        backend = self._backend
        for phase in Phase:  # made before the memory is divided, and not while a graph is captured
            backend.beside(backend.stream(phase, backend.num_sms).torch_stream)
            backend.capture_stream(phase, backend.num_sms)
        plans: dict[Problem, Plan] = {}
        try:
            plans = self._find_plans()
        except WrongPlan:
            logger.warning("products and their collectives run in sequence", exc_info=True)
        except Exception as error:
            error.add_note("Engine(calibrate=False) starts without plans, and nothing overlaps.")
            raise
        by_shape = {(item.num_rows, item.num_outputs, item.num_inputs): plan for item, plan in plans.items()}
        return OverlappedProducts(FixedPlans(backend.num_sms, by_shape), backend, self.release, self._copies)

    def _find_plans(self) -> dict[Problem, Plan]:
        backend, group, device = self._backend, self._group, self._device
        store = PlanStore(plans_path() if group.shard.rank == 0 else None, reads=self._config.calibrate is not True)
        stream = backend.stream(Phase.PREFILL, backend.num_sms).torch_stream
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            tuner = ProductTuner(
                group,
                stream,
                StepContext(backend.num_sms, LaneBuffers(device), Phase.PREFILL),
                ops=create_ops("triton"),
                dtype=self._dtype,
                sides=backend,
                release=self.release,
                copies=self._copies,
            )
            plans = find_plans(self._problems(), store, group.share, tuner.tune)
            for problem, plan in plans.items():
                if plan != SEQUENCE:
                    tuner.check(problem, plan)
            torch.cuda.synchronize(device)
        return plans

    def _problems(self) -> list[Problem]:
        """Those of the steps that have the whole device: of prompts alone, and MIXED."""
        own = self._own
        any_problem = Problem(
            device=_describe(self._device),
            num_rows=1,
            num_outputs=1,
            num_inputs=1,
            dtype=str(self._dtype).removeprefix("torch."),
            world_size=self._group.shard.world_size,
            num_sms=self._backend.num_sms,
            collective=Collective.ALL_REDUCE,
            ctas=self._beside_ctas,
            has_copies=bool(self._copies),
        )
        shapes = [(own.hidden_size, own.num_heads * own.head_dim), (own.hidden_size, own.intermediate_size)]
        return problems_of(any_problem, shapes, self._max_rows)


def agree_to_overlap(
    config: EngineConfig,
    own: ModelSpec,
    group: TensorGroup,
    local_shard: Shard,
    max_rows: int,
    backend: PlainStreamBackend,
    device: torch.device,
    dtype: torch.dtype,
) -> Overlap | None:
    """What products overlap by, if all ranks can and may; each calls it.

    Args:
        own: what this rank computes of the model.
        local_shard: its place among the ranks of its host.
        max_rows: of a step.
    """
    can = config.calibrate is not False and is_hopper(device) and dtype in (torch.bfloat16, torch.float16)
    if group.agree_min(int(can)) == 0:
        return None
    is_on_one_host = local_shard.world_size == group.shard.world_size
    return Overlap(config, own, group, is_on_one_host, max_rows, backend, device, dtype)


def _describe(device: torch.device) -> str:
    """What plans depend on beside sizes."""
    nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return f"{torch.cuda.get_device_name(device)}, NCCL {'.'.join(map(str, nccl))}"


def plans_path() -> Path | None:
    """Where plans are kept; None if nowhere."""
    folder = cache_folder()
    return None if folder is None else folder / "overlap" / "plans.json"
