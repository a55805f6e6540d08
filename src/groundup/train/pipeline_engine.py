"""The engine of a rank that holds some stages of the model."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from groundup.base.failpoints import reach
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import Hidden
from groundup.model.loss import EXPERT_LOAD, LossSums
from groundup.parallel.pipeline import Pipeline
from groundup.parallel.shards import local_gradient
from groundup.train.spread_engine import SpreadEngine

TIED = "model.embed_tokens.weight"


class PipelineEngine(SpreadEngine):
    """As `SpreadEngine`; a step's micro-batches go through the stages of the rank's column by torch's schedule.

    Embedding and head that are one weight lie at both ends: their gradients are added up before the norm, the first rank
    counts and saves them.
    """

    def _own_weights(self, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        mesh, parallel = self.world.mesh, self.world.parallel
        self._pipeline = Pipeline(self.model, mesh, parallel.pipeline_schedule, device=self.device, dtype=dtype)
        masters, copies = super()._own_weights(dtype)
        self._has_tied = self.model.config.tie_word_embeddings and TIED in masters
        if self._has_tied:
            # the pipeline is the outermost dimension: what is left of a rank is its place in the first stage
            owner = self.holdings[TIED].owner % (mesh.size // mesh.degrees["pipeline"])
            self.holdings[TIED] = replace(self.holdings[TIED], owner=owner)
        for name, copy in copies.items():
            copy.register_post_accumulate_grad_hook(self._adder(name))  # type: ignore[no-untyped-call]
        return masters, copies

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        """What takes a micro-batch's gradient of a copy to where it is summed, in fp32."""

        def add(copy: Tensor) -> None:
            assert isinstance(copy, nn.Parameter)
            gradient = local_gradient(copy)
            assert gradient is not None
            self._add_gradients(name, [gradient])
            copy.grad = None

        return add

    def _parts(self, batch: RowBatch) -> list[tuple[int, RowBatch]]:
        """All of one shape, and as many as the schedule asks for: what is missing has no labels."""
        rows = min(self.micro_batch_rows, len(batch))
        parts = [(begin, part.padded(rows)) for begin, part in super()._parts(batch)]
        begin, first = parts[0]
        missing = self._pipeline.num_micro_batches(len(parts)) - len(parts)
        return parts + [(begin, first.without_labels())] * missing

    def _add_up(
        self,
        totals: dict[str, Tensor],
        batch: RowBatch,
        divisor: int,
        seed_of: Callable[[int], int],
        should_stop: Callable[[], bool],
    ) -> None:
        """Each rank brings to `totals` what its stages know: the last one the losses, each its experts' load."""
        parts = self._parts(batch)

        def compute(stage: int, number: int, x_BTD: Tensor | None) -> Tensor:
            begin, part = parts[number]
            # stages draw other masks, and so do ranks with other tokens of a row
            torch.manual_seed(seed_of(begin) + stage * len(batch) + self.world.mesh.coordinates["context"])
            out = self._forward_stage(part, stage, x_BTD)
            if isinstance(out, Hidden):
                if out.expert_load_LE is not None:
                    self._add_load(totals, stage, out.expert_load_LE)
                return out.h_BTD
            found = self._totals(out, part)
            if EXPERT_LOAD in found:
                self._add_load(totals, stage, found.pop(EXPERT_LOAD))
            self._merge(totals, found, {})
            return self._to_minimise(out, divisor)

        self._pipeline.run(len(parts), parts[0][1].tokens_BT.shape, compute)
        if not self._copies:
            self._take_gradients()

    def _add_load(self, totals: dict[str, Tensor], stage: int, load_LE: Tensor) -> None:
        layers = self._pipeline.ranges[stage]
        places = [place for place, layer in enumerate(self.model.sparse_layers) if layer in layers]
        totals[EXPERT_LOAD][places] += load_LE

    def _forward_stage(self, part: RowBatch, stage: int, x_BTD: Tensor | None) -> LossSums | Hidden:
        reach("engine.forward")
        part = part.to(self.device)
        out: LossSums | Hidden = self.model(
            part.tokens_BT,
            part.segments,
            part.labels_BT,
            num_loss_tokens=part.num_loss_tokens,
            grad_scale=self._grad_scale,
            x_BTD=x_BTD,
            layers=self._pipeline.ranges[stage],
        )
        return out

    def _sum_over_ranks(self, totals: list[Tensor]) -> None:
        self.world.all_reduce_gradients(totals, ("pipeline",))
        super()._sum_over_ranks(totals)
        gradient = self.masters[TIED].grad if self._has_tied else None
        if gradient is not None:
            self._pipeline.add_between_ends(gradient)

    @torch.no_grad()
    def _forward(self, part: RowBatch) -> LossSums:
        """Losses of rows, the same on every rank; of the experts nothing is told."""
        terms = self.model.extra_terms()
        found = [torch.zeros(2 + len(terms), device=self.device), torch.zeros(part.tokens_BT.shape, device=self.device)]

        def compute(stage: int, _: int, x_BTD: Tensor | None) -> Tensor:
            out = self._forward_stage(part, stage, x_BTD)
            if isinstance(out, Hidden):
                return out.h_BTD
            found[0] = torch.stack([out.loss_sum, out.nll_sum, *out.extras.values()])
            found[1] = out.per_token_BT
            return out.loss_sum

        self._pipeline.pass_through(part.tokens_BT.shape, compute)
        sums, per_token_BT = (self._pipeline.broadcast_from_last(tensor) for tensor in found)
        loss_sum, nll_sum, *extras = sums
        return LossSums(loss_sum, nll_sum, part.num_loss_tokens, per_token_BT, dict(zip(terms, extras, strict=True)))
