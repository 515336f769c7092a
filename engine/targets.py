"""What a method is given in a step: the targets of a batch, and which forwards of the student there are.

Dimension key: B batch, C channels, H, W, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from retemper.engine.distributed.ranks import WHOLE, Part
from retemper.engine.losses import at_least_float32, cross_entropy_rows


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of the student on one batch. A field is None where the method does not ask for it.

    Attributes:
        label_B: (B,) int64.
        counted_B: (B,) int64, the class that each row is counted under, -1 for none; None where it is the label.
        teacher_BK: the teacher's logits on the clean images.
        own_BK: the student's own logits on the clean images, taken before the attack in the attack's batch-norm mode,
            without gradient (`Method.needs_own_prediction`).
        teacher_adv_BK: the teacher's logits on the attacked images; None during the attack (`Method.teacher_sees`).
        teacher_slope: the gradient of the teacher's logit of each label at the clean images, (B, C, H, W), times
            `Method.attacks_slope`.
        teacher_views: the teacher's logits on further images of the step by name (`Method.views`); empty in the attack.
        clean_teacher_BK, clean_teacher_adv_BK: the second teacher's logits (`Method.clean_teacher_sees`).
        average_BK, average_adv_BK: the logits of the average of the student's weights (`Method.average_sees`).
        peer_BK: the peer's logits on the clean images, in eval mode and without gradient (`Method.trains_peer`).
        peer_adv_BK: the peer's logits on the attacked images, in training mode and with gradient; None in the attack.
        progress: the share of the run that is done, 0-dim in [0, 1) (`Method.watches_progress`).
        uniform_BK: random numbers of this step, uniform in [0, 1], of each image and class (`Method.draws`).
        watched: what `Method.watcher` returned, after the attack.
        label_smoothing: how much of a label's weight is spread over all classes (`Optimisation.label_smoothing`).
        attack: which attack of the step this is, from 0, where the method takes several.
        state: the method's class state.
        part: the rows of the batch that these are, where several processes train. A method asks it for what it needs of
            the batch as a whole.
    """

    label_B: Tensor
    counted_B: Tensor | None = None
    teacher_BK: Tensor | None = None
    own_BK: Tensor | None = None
    teacher_adv_BK: Tensor | None = None
    teacher_slope: Tensor | None = None
    teacher_views: Mapping[str, Tensor] = field(default_factory=dict)
    clean_teacher_BK: Tensor | None = None
    clean_teacher_adv_BK: Tensor | None = None
    average_BK: Tensor | None = None
    average_adv_BK: Tensor | None = None
    peer_BK: Tensor | None = None
    peer_adv_BK: Tensor | None = None
    progress: Tensor | None = None
    uniform_BK: Tensor | None = None
    watched: Any = None
    label_smoothing: float = 0.0
    attack: int = 0
    state: Mapping[str, Tensor]
    part: Part = WHOLE

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits on the clean images, for methods that have a teacher."""
        return given(self.teacher_BK)

    def cross_entropy_rows(self, logits_BK: Tensor) -> Tensor:
        """Return the cross-entropy of each row against its label, smoothed as the run says; (B,), as a piece of a loss.

        Raises:
            TypeError, ValueError: as `retemper.engine.losses.cross_entropy_rows`.
        """
        return cross_entropy_rows(logits_BK, self.label_B, self.label_smoothing)

    def cross_entropy(self, logits_BK: Tensor) -> Tensor:
        """Return the mean of `cross_entropy_rows`, a scalar, in one operation."""
        return F.cross_entropy(at_least_float32(logits_BK), self.label_B, label_smoothing=self.label_smoothing)

    @property
    def uniform(self) -> Tensor:
        """The random numbers of this step, for methods that draw."""
        return given(self.uniform_BK)

    @property
    def own(self) -> Tensor:
        """The student's own logits on the clean images, for methods that ask for them."""
        return given(self.own_BK)


def given(asked_BK: Tensor | None) -> Tensor:
    """Return what the method asked for: logits, or random numbers."""
    assert asked_BK is not None, "the method reads what it does not ask for"
    return asked_BK


@dataclass(frozen=True)
class Forwards:
    """The student's forwards in training mode in one step, by the names of their images.

    All of them move the batch-norm statistics. Authors' code takes some of them for nothing else.

    Attributes:
        before: in their order, before the backward pass. The first of a name enters the loss; a repeat is of no use.
        after: those after the optimizer's step, of no use either.
    """

    before: tuple[str, ...]
    after: tuple[str, ...] = ()
