"""Classes of tries, and how many of each make a full run."""

from __future__ import annotations

from tests.fuzz import bundles, others
from tests.fuzz.harness import Target

TARGETS = {
    "golden": Target(105, bundles.golden, ("plain",)),
    "model": Target(308, bundles.hostile_model, ("plain", "images", "keys")),
    "signature": Target(53, bundles.signature, ("signed", "images")),
    "manifest": Target(5694, bundles.manifest, ("plain", "bundle", "images", "keys")),
    "injection": Target(195, bundles.injection, ("plain",)),
    "report": Target(2100, others.report, ("results",)),
    "student": Target(294, others.student, ("student",)),
    "checkpoint": Target(1399, others.checkpoint, ("training",)),
    "weights": Target(31, others.weights, ("student",)),
    "settings": Target(560, others.settings, ("bundle",)),
    "usage": Target(601, others.usage, ("plain", "student", "results", "images")),
    "video": Target(328, others.videos, ("plain", "video")),
    "http": Target(200, others.http),
}
