"""Known licenses of weights, and the files LICENSE and NOTICE of a Hub folder."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from trex_models.pretrained import naver

ORIGIN = "https://github.com/naver/trex"
PAPER = (
    'Sariyildiz, Kalantidis, Alahari, Larlus, "No Reason for No Supervision: Improved '
    'Generalization in Supervised Models", ICLR 2023, https://arxiv.org/abs/2206.15369'
)


class License(NamedTuple):
    """A license of weights."""

    name: str
    spdx: str
    url: str
    meaning: str


_CC = "https://creativecommons.org"
_ATTRIBUTION = "name the source, link to the license and say what you changed"

# Hub identifier -> license. Add a row to support another license.
LICENSES = {
    "apache-2.0": License(
        "Apache License 2.0",
        "Apache-2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        "Use, change and share them, commercially too: keep the notices, say what you changed.",
    ),
    "mit": License(
        "MIT License",
        "MIT",
        "https://opensource.org/license/mit",
        "Use, change and share them, commercially too: keep the copyright notice.",
    ),
    "cc0-1.0": License(
        "Creative Commons Zero 1.0 Universal",
        "CC0-1.0",
        f"{_CC}/publicdomain/zero/1.0/",
        "Use, change and share them for any purpose, without conditions.",
    ),
    "cc-by-4.0": License(
        "Creative Commons Attribution 4.0 International",
        "CC-BY-4.0",
        f"{_CC}/licenses/by/4.0/",
        f"Use, change and share them, commercially too: {_ATTRIBUTION}.",
    ),
    "cc-by-sa-4.0": License(
        "Creative Commons Attribution-ShareAlike 4.0 International",
        "CC-BY-SA-4.0",
        f"{_CC}/licenses/by-sa/4.0/",
        f"Use, change and share them, commercially too: {_ATTRIBUTION}, and share what you "
        "derive from them under the same license.",
    ),
    "cc-by-nc-4.0": License(
        "Creative Commons Attribution-NonCommercial 4.0 International",
        "CC-BY-NC-4.0",
        f"{_CC}/licenses/by-nc/4.0/",
        f"Not for commercial use. Otherwise use, change and share them: {_ATTRIBUTION}.",
    ),
    "cc-by-nc-sa-4.0": License(
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
        "CC-BY-NC-SA-4.0",
        f"{_CC}/licenses/by-nc-sa/4.0/",
        f"Not for commercial use. Otherwise use, change and share them: {_ATTRIBUTION}, and "
        "share what you derive from them, fine-tuned weights too, under the same license.",
    ),
}


def find_license(identifier: str) -> License:
    """Return the license with a Hub identifier.

    Raises:
        ValueError: The license is not in the table.
    """
    if identifier not in LICENSES:
        raise ValueError(
            f"unknown license {identifier!r}; choose one of {', '.join(LICENSES)}, or add it to "
            "hub/notices.py"
        )
    return LICENSES[identifier]


def license_text(identifier: str) -> str:
    """Return a LICENSE file that links to the full text of the license."""
    license_ = find_license(identifier)
    return (
        f"License of the weights in this repository: {license_.name}\n"
        f"SPDX-License-Identifier: {license_.spdx}\n"
        f"Full text: {license_.url}\n\n"
        f"{textwrap.fill(f'What it means, in short: {license_.meaning}', 80)}\n\n"
        "NOTICE names the owner of the weights. Only the full text is binding.\n"
    )


def naver_notice(name: str, changes: str) -> str:
    """Return the NOTICE file of one of NAVER's models; ``name`` is model and tag."""
    files = " or ".join(f"{naver.BASE_URL}/{file}" for file in naver.FILES[name])
    return _paragraphs(
        name,
        "The weights in this repository are NAVER Corporation's, trained and released by the "
        f"authors of t-ReX: {PAPER}",
        f"Source: {files} ({ORIGIN})",
        f"License: {find_license(naver.LICENSE).name} (LICENSE). They must not be used "
        "commercially, and what is derived from them must be shared under the same license. (That "
        "is what the release's own LICENSE says; its NOTICE says Attribution-NonCommercial. The "
        "stricter one is stated here.)",
        f"Changes: {changes}",
        "They were converted, not trained, by the authors of trex_models, whom NAVER has not "
        "endorsed. They come without any warranty.",
    )


def owner_notice(name: str, owner: str, identifier: str) -> str:
    """Return the NOTICE file of a model that somebody trained with this package."""
    derived = (
        "This is also the license of NAVER Corporation's weights. If the training started from "
        f"those (init_from in its config.json), these are derived from them ({ORIGIN}), changed by "
        "that training."
    )
    return _paragraphs(
        name,
        f"The weights in this repository are {owner}'s, trained with trex_models.",
        f"License: {find_license(identifier).name} (LICENSE).",
        f"trex_models implements t-ReX: {PAPER}. Its authors did not train these weights.",
        *([derived] if identifier == naver.LICENSE else []),
    )


def _paragraphs(*paragraphs: str) -> str:
    # URLs may be longer than a line and must not be broken.
    wrapped = [
        textwrap.fill(p, 80, break_long_words=False, break_on_hyphens=False) for p in paragraphs
    ]
    return "\n\n".join(wrapped) + "\n"
