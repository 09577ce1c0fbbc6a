"""Names taken apart and model cards, beside what the format's own package makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import Metadata
from gguf.utility import size_label as their_size_label
from mla_backend.convert.model_card import card_keys
from mla_backend.convert.naming import name_of_directory, parse_name, size_label, title_of

NAMES = [
    "hf",
    "tiny-v2",
    "Family-V3",
    "Family-V2-Lite-Chat",
    "Family-V2.5-1210",
    "Family-R1-0528",
    "Family-K2-Instruct",
    "owner/Family-16B-A3B-Instruct",
    "owner/Family3-10B-A1.8B",
    "Family-7b1-chat",
    "Family-7B-128k",
    "family-large-7B-Q4_K",
    "Family-V3-bf16",
    "A name with blanks",
]


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    n_params = 16_000_000_000
    full, owner, basename, finetune, version, size = Metadata.get_model_id_components(
        name, n_params
    )
    found = parse_name(name, n_params)
    assert found.basename == basename
    assert found.finetune == finetune
    assert found.version == version
    assert found.size_label == size
    assert found.organization == (Metadata.id_to_title(owner) if owner else None)
    if " " not in name:
        assert found.title == Metadata.id_to_title(full)


@pytest.mark.parametrize("expert", [0, 44, 900_000, 2_300_000_000, 1_000_000_000_000])
@pytest.mark.parametrize("shared", [999, 12_345, 9_999_999])
def test_size_labels(shared: int, expert: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (shared,)}
    if expert:
        shapes["blk.1.ffn_up_exps.weight"] = (8, 1, expert)
    assert size_label(shapes) == their_size_label(
        0 if expert else shared, shared, expert, 8 if expert else 0
    )


def test_directories(tmp_path: Path) -> None:
    assert name_of_directory(tmp_path / "Family-V3") == "Family-V3"
    cached = tmp_path / "models--owner--Family-V3" / "snapshots" / ("0" * 40)
    assert name_of_directory(cached) == "owner/Family-V3"
    assert title_of("tiny-v2 ABC-def") == "Tiny v2 ABC Def"


CARD = """---
license: other
license_name: "some-licence"
license_link: LICENSE
language:
- en
- zh
tags: [a, 'b c']
pipeline_tag: text-generation
base_model:
  - owner/Family-V3-Base
  - https://example.org/model
datasets: owner/data
widget:
  - text: nested
---
# Title
tags: not these
"""


def test_model_cards(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    assert card_keys(tmp_path, 10**9) == {
        "general.license": "other",
        "general.license.name": "some-licence",
        "general.license.link": "LICENSE",
        "general.base_model.count": 2,
        "general.base_model.0.name": "Family V3 Base",
        "general.base_model.0.organization": "Owner",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/Family-V3-Base",
        "general.base_model.1.repo_url": "https://example.org/model",
        "general.dataset.count": 1,
        "general.dataset.0.name": "Data",
        "general.dataset.0.organization": "Owner",
        "general.dataset.0.repo_url": "https://huggingface.co/owner/data",
        "general.tags": ("a", "b c", "text-generation"),
        "general.languages": ("en", "zh"),
    }


@pytest.mark.parametrize("text", ["", "# Title\n", "---\nlicense: mit\n", "---\n---\n"])
def test_cards_without_a_head(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_keys(tmp_path, 1) == {}
    assert card_keys(tmp_path / "none", 1) == {}
