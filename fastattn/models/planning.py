"""The plan of `fastattn plan`: the fastest measured policies of a loaded model on the running ranks.

Exact sums, for prefill and decode each; with a text, also those formats of few bits that it allows, if the
model of time sees them ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..collectives.compressed import Compressed
from ..parallel import measure
from ..parallel.candidates import Candidate, codec_of, untiled, with_codec
from ..parallel.candidates import candidates as found_by
from ..parallel.forecast import Costs
from ..parallel.plan import PHASES, points_of
from ..parallel.planner import MARGIN, Choice, Trial, choose, costs, forecasts
from ..quant.codec import Codec
from ..spec import Link, Phase, SyncPlan
from .formats import FORMATS, Formats
from .generate import Model
from .perplexity import Perplexity
from .quality import Quality
from .trial import Trials


@dataclass(frozen=True)
class Findings:
    """What was measured and chosen on the way to a plan."""

    link: Link | None  # None with one rank
    costs: dict[Phase, Costs]
    choices: dict[Phase, Choice]
    plan: SyncPlan


class Planner:
    """Measures and chooses.

    ``fingerprint``: of the model's checkpoint. ``quality``: what lossy formats cost; None: exact sums only.
    ``budget_s``: about what measuring the candidates of a phase may take. ``say`` hears of formats measured.
    """

    def __init__(
        self,
        model: Model,
        fingerprint: str,
        trials: Trials,
        quality: Quality | None = None,
        budget_s: float = 20.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not 0 < budget_s < float("inf"):
            raise ValueError(f"budget_s: {budget_s}, expected seconds > 0")
        self.model, self.group, self.trials = model, model.group, trials
        self.fingerprint, self.budget_s = fingerprint, budget_s
        self.formats = None if quality is None else Formats(quality, say)
        self._increases: dict[Candidate, Perplexity] = {}

    def plan(self) -> Findings:
        """The plan, with all that led to it. Every rank calls it and gets the same."""
        if self.group.world == 1:
            exact = self.candidates("decode")[0]
            alone = Choice(Trial(exact, 0.0, 0), "one rank has nothing to sum", [])
            return self._findings(None, {}, dict.fromkeys(PHASES, alone))
        hidden = self.model.config.hidden_size
        link, measured, choices = measure.link(self.group), dict[Phase, Costs](), dict[Phase, Choice]()
        for phase in PHASES:
            measured[phase] = costs(
                self.group, self.trials, phase, link, hidden, self.model.dtype,
                () if self.formats is None else [f.typical(hidden) for f in FORMATS],
            )  # fmt: skip
            found = self.candidates(phase)
            found += self.lossy(phase, found, measured[phase])
            choices[phase] = choose(
                self.group, self.trials, phase, found, measured[phase], self.budget_s, permits=self._permits
            )
        return self._findings(link, measured, choices)

    def candidates(self, phase: Phase, *codecs: Codec) -> list[Candidate]:
        """What a phase is chosen from."""
        rows, layers = self.trials.rows(phase)[0], self.model.config.num_layers
        return found_by(phase, rows, layers, self.group, self.model.dtype.itemsize, codecs)

    def lossy(self, phase: Phase, exact: list[Candidate], costs: Costs) -> list[Candidate]:
        """Candidates in the formats that the text allows, as long as the model sees them ahead."""
        if self.formats is None:
            return []
        rows, hidden = self.trials.rows(phase), self.model.config.hidden_size
        typical = {f: f.typical(hidden) for f in FORMATS}
        sending = {
            f: [c for c in self.candidates(phase, codec) if codec_of(c.attn[0]) == codec]
            for f, codec in typical.items()
        }
        times = {f: forecasts(found, rows, costs)[0].modelled_s for f, found in sending.items()}
        bar = MARGIN * forecasts(exact, rows, costs)[0].modelled_s
        ahead = sorted((f for f in FORMATS if times[f] < bar), key=times.__getitem__)
        found = []
        for f, allowed in self.formats.allowed(ahead):
            self._increases[allowed.policies(lambda codec: Compressed(codec=codec))] = allowed.increase
            for c in sending[f]:
                attn, mlp = map(with_codec, c.attn, allowed.attn), map(with_codec, c.mlp, allowed.mlp)
                found.append(Candidate(tuple(attn), tuple(mlp), c.schedule))
        return found

    def _findings(
        self, link: Link | None, measured: dict[Phase, Costs], choices: dict[Phase, Choice]
    ) -> Findings:
        chosen = {phase: choices[phase].trial.candidate for phase in PHASES}
        layers = self.model.config.num_layers
        plan = SyncPlan(
            self.fingerprint, self.group.world, self.group.weights,
            {p: chosen[p.phase].policy(p) for p in points_of(layers)},
            {phase: chosen[phase].schedule for phase in PHASES}, self._quality(chosen),
        )  # fmt: skip
        return Findings(link, measured, choices, plan)

    def _permits(self, c: Candidate) -> bool:
        """Whether it keeps the bound on perplexity."""
        if c.exact or self.formats is None:
            return c.exact
        return self.formats.quality.keeps(self._increase(c))

    def _increase(self, c: Candidate) -> Perplexity:
        """Of the perplexity, measured once: rows are coded one by one, so tiles and halves change nothing."""
        assert self.formats is not None
        whole = Candidate(tuple(map(untiled, c.attn)), tuple(map(untiled, c.mlp)))
        if whole not in self._increases:
            self._increases[whole] = self.formats.quality.increase(whole)
        return self._increases[whole]

    def _quality(self, chosen: dict[Phase, Candidate]) -> dict[str, object]:
        """What the plan file says about it."""
        if self.formats is None:
            return {}
        quality = self.formats.quality
        facts: dict[str, object] = {"tokens": quality.tokens, "token_ids_sha256": quality.digest}
        facts |= {"exact_perplexity": quality.exact.value, "max_increase": quality.max_increase}
        for phase, c in chosen.items():
            value, error = (0.0, 0.0) if c.exact else self._increase(c)
            facts[phase] = {"increase": value, "standard_error": error}
        return facts
