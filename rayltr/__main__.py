"""`rayltr search|train|export|predict|report|inspect|adapt|prune ...`: the commands under one name."""

import sys
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "search": ("rayltr.search", "search the recipes of a study on your data"),
    "train": ("rayltr.recipe", "train one recipe, without a search"),
    "export": ("rayltr.export", "write the best configuration and weights of a run as files"),
    "predict": ("rayltr.predict", "use an exported model on images"),
    "report": ("analysis.__main__", "write the report of a run"),
    "inspect": ("rayltr.inspect", "look into a trained vision transformer with two tokens"),
    "adapt": ("rayltr.adapt", "weigh the experts of a trained trial for unlabelled images"),
    "prune": ("rayltr.prune", "make a run small: weights of its best trials only"),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        command = import_module("rayltr.command")  # only the command that was asked for is imported
        del sys.argv[1]
        return command.run(import_module(COMMANDS[name][0]).main)
    lines = [f"  {command:9}{text}" for command, (_, text) in COMMANDS.items()]
    if name not in ("-h", "--help"):
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"rayltr: there is no command {name!r}; {hint}commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    print("\n".join(["usage: rayltr COMMAND ...", "", *lines, "", "rayltr COMMAND --help says more"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
