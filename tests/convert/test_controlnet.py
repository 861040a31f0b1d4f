"""ControlNets in the original's layout and in diffusers', both ways, and what is refused."""

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import engine, layouts
from convert.__main__ import main
from convert.architecture.controlnet import from_config
from convert.controlnet import check_controlnet
from convert.export.controlnet import controlnet_json
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from convert.layouts import Place
from convert.msgpack_file import msgpack_tensors
from convert.random import TINY
from holes import write_holes
from tests.convert.controlnet_files import DESCRIBED, SHOWN, checkpoint, original_shapes
from tests.convert.diffusers_folder import FILES, write_folder
from tests.convert.lossless import assert_lossless, foreign_arrays
from tests.convert.published_files import shapes
from tests.convert.test_rules import unets
from tests.convert.torch_files import torch_bytes
from unclip_jax.checkpoints.config import CheckpointConfig, ControlNetCheckpointConfig, read_config
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint, open_controlnet
from unclip_jax.models.configs import ControlNetConfig

ROOT = "control_model."
