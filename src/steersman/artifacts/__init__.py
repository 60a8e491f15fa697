"""Artifacts on disk and on the Hub: a folder of manifest.json and tensors.safetensors; a file a kind here."""

from steersman.artifacts.affine_map import load_affine_map, save_affine_map
from steersman.artifacts.causal_screen import load_screen, save_screen
from steersman.artifacts.concept import load_concept, save_concept
from steersman.artifacts.contrast import load_contrast, save_contrast
from steersman.artifacts.folder import MANIFEST, TENSORS, check_free, new_folder
from steersman.artifacts.hub import push_folder, save_with_card
from steersman.artifacts.manifest import read_manifest
from steersman.artifacts.profile import load_profile, save_profile
from steersman.artifacts.steering import load_steering, save_steering

__all__ = [
    "MANIFEST",
    "TENSORS",
    "check_free",
    "load_affine_map",
    "load_concept",
    "load_contrast",
    "load_profile",
    "load_screen",
    "load_steering",
    "new_folder",
    "push_folder",
    "read_manifest",
    "save_affine_map",
    "save_concept",
    "save_contrast",
    "save_profile",
    "save_screen",
    "save_steering",
    "save_with_card",
]
