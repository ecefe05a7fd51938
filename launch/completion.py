"""Completion of words in a shell, as ``cliplift --completion SHELL`` prints it: commands, options and config keys.

The script holds every word, so that the tab key starts no Python. It is made anew after an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")

BASH = """# eval "$(cliplift --completion bash)"
_cliplift() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    if (( COMP_CWORD == 1 )); then words="{commands}"
    else case ${{COMP_WORDS[1]}} in
{cases}
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -o default -F _cliplift cliplift
"""
ZSH = """# eval "$(cliplift --completion zsh)"
autoload -Uz bashcompinit && bashcompinit
"""


def completion_script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """What a shell evaluates to complete words.

    Args:
        shell: one of ``SHELLS``.
        words: what may follow each command.
    """
    if shell == "fish":
        lines = [f"complete -c cliplift -n __fish_use_subcommand -a '{' '.join(words)}'"]
        lines += [
            f"complete -c cliplift -n '__fish_seen_subcommand_from {command}' -a '{' '.join(following)}'"
            for command, following in words.items()
        ]
        return "# cliplift --completion fish | source\n" + "\n".join(lines) + "\n"
    cases = "\n".join(
        f'        {command}) words="{" ".join(following)}";;' for command, following in words.items()
    )
    bash = BASH.format(commands=" ".join(words), cases=cases)
    return bash if shell == "bash" else ZSH + bash.split("\n", 1)[1]
