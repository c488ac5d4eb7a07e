"""What looks at a step from the side while it runs, and what is made of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.training import get_args

from megatron_hetermoe.mcore.load import Load, LoadWarnings
from megatron_hetermoe.mcore.numbers import Numbers
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.selfcheck import Checksums
from megatron_hetermoe.runtime.transfers import PARTS


@dataclass
class StepChecks:
    """What notes one step.

    Attributes:
        numbers: where they stop being finite.
        checksums: of all messages, in a step that is compared.
        load: of all experts, in a step that is looked at.
    """

    numbers: Numbers
    checksums: Checksums | None = None
    load: Load | None = None


class Checker:
    """Decides for each step what notes it. All ranks decide alike, since they count the same steps.

    Args:
        session: this rank's.
        marks: told what runs.
        self_check: training steps from one comparison of what was sent with what came to the next; None for never.
    """

    def __init__(self, session: Session, marks: Marks, self_check: int | None):
        self._session = session
        self._marks = marks
        self._self_check = self_check
        self._load_warnings = LoadWarnings(session)
        self._steps = 0  # of training

    def training_step(self) -> StepChecks:
        """What notes the next training step."""
        self._steps += 1
        numbers = Numbers(self._session, get_args().check_for_nan_in_loss_and_grad)
        checksums = None
        if self._self_check and self._steps % self._self_check == 0:
            group = self._session.layout.group_of(self._session.rank)
            checksums = Checksums(self._session.layout.zp_group(group), self._session.member)
        return StepChecks(numbers, checksums, self._load_warnings.of_step(self._steps))

    def evaluation_step(self) -> StepChecks:
        """What notes an evaluation step."""
        return StepChecks(Numbers(self._session, enabled=False))

    def after(self, checks: StepChecks) -> None:
        """After the step's last task, and before the optimizer uses what came.

        Raises:
            RuntimeError: on one rank, which names the message that did not come as it was sent.
        """
        if checks.checksums is not None:
            self._compare(checks.checksums)
        if checks.load is not None:
            self._load_warnings.look(checks.load, self._steps)

    def _compare(self, checksums: Checksums) -> None:
        self._marks.enter("the self-check")
        wrong = checksums.mismatches(self._session.control)
        if wrong and wrong[0].receiver == self._session.rank:  # one rank speaks; the others end because it does
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            first = wrong[0]._replace(task=self._session.numbering.in_model(wrong[0].task))
            raise RuntimeError(
                f"self-check: what came is not what was sent: {first.describe(PARTS)}{more}. A link or a memory "
                "corrupts data: leave these ranks' machines out, and go on from the last checkpoint"
            )
