"""How often the ranks of a training are started again when some of them die."""


class Restarts:
    """The restarts of a run: so many without progress between them.

    A run of weeks loses many nodes, while one that cannot get on fails again and again.

    Args:
        most: ``cluster.max_restarts``.
        step: of the newest checkpoint.
    """

    def __init__(self, most: int, step: int) -> None:
        self._most, self._step, self._count = most, step, 0

    def take(self, step: int) -> str:
        """Count a restart and return which one it is, as "1 of 3"; empty where none is left.

        Args:
            step: of the newest checkpoint now: behind the one before, all restarts are given back.
        """
        if step > self._step:
            self._step, self._count = step, 0
        self._count += 1
        return f"{self._count} of {self._most}" if self._count <= self._most else ""
