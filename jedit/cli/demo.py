"""`jedit demo`: train, forget, compare and report on the scenes."""

from jedit.cli.options import Demo
from jedit.cli.stages import Stages, check_out, report


def demo(options: Demo, command: str) -> int:
    """Run the scenes, write their report; return the exit code."""
    check_out(options.out)
    stages = Stages()

    def scenes() -> list:
        found = []
        if options.scene in ("digits", "all"):
            from jedit.recipes.scenes.digits import ALL, GRID, digits

            grid = ALL if options.methods == "all" else GRID
            found += digits(seed=options.seed, say=stages, grid=grid)
        if options.scene in ("authors", "all"):
            from jedit.recipes.scenes.authors import ALL, GRID, authors

            grid = ALL if options.methods == "all" else GRID
            found += authors(seed=options.seed, say=stages, grid=grid)
        return found

    return report(scenes, stages, options.out, options.seed, command)
