"""The published architectures have the published sizes."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastdistill.models.configs import known_configurations, model_configuration

PARAMETERS = {
    "dit_xl2_256": 749_826_464,
    "dit_xl2_512": 749_826_464,
    "edm_cifar10": 62_427_395,
    "edm_imagenet64": 295_897_731,
    "flux_dev": 11_901_408_320,
    "pixart_alpha_1024": 611_349_152,
    "pixart_alpha_512": 610_856_096,
    "sd15": 859_520_964,
    "sd35_medium": 2_243_171_520,
    "sd3_medium": 2_028_328_000,
    "sdxl": 2_567_463_684,
}


def test_each_file_has_a_size_to_be_held_to():
    assert known_configurations() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_diffusers_builds_a_network_of_the_published_size(name):
    config = model_configuration(name)
    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network = kind.from_config(config)
    unknown = set(config) - set(network.config) - {"_class_name"}
    assert not unknown
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'sd_xl'; did you mean sdxl\?"):
        model_configuration("sd_xl")
