"""One good scan, list, network or cache of every format, small, as bytes in memory: what is then damaged."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.settings import to_mapping, to_named, write_yaml
from mim3d.datasets.cases import read_cases
from mim3d.planning.plan import Plan
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from mim3d.weights import save_network

SHAPE = (11, 10, 9)
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"


@dataclass(frozen=True)
class Specimen:
    """A good source in one format.

    Attributes:
        format: Its row in the table.
        target: What is read: a file, or "" for the folder.
        files: Relative path -> content.
        kind: How it is read, see ``reading.READERS``.
        claimed_bytes: Size of its voxels or tensors, unpacked.
    """

    format: str
    target: str
    files: dict[str, bytes]
    kind: str
    claimed_bytes: int


def ct() -> np.ndarray:
    """A CT of a noisy body in air, (X, Y, Z) int16."""
    rng = np.random.default_rng(0)
    array = np.full(SHAPE, -1000.0)
    array[2:-2, 2:-2, 1:-1] = rng.normal(40, 30, (7, 6, 7))
    return array.round().astype(np.int16)


def label() -> np.ndarray:
    """Its label map."""
    return (ct() > 40).astype(np.uint8)


def specimens() -> list[Specimen]:
    """All of them, several in some formats; the same at every call."""
    with tempfile.TemporaryDirectory() as scratch:
        made = []
        for number, make in enumerate(_MAKERS):
            folder = Path(scratch, str(number))
            folder.mkdir()
            made += list(make(folder))
        return made


def _held(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    return held


def _nifti(folder: Path) -> Iterator[Specimen]:
    affine = np.array([[0.7, 0, 0, -4], [0, 0.8 * 0.8, -0.6 * 2.5, 5], [0, 0.8 * 0.6, 0.8 * 2.5, 6], [0, 0, 0, 1.0]])
    for name, image in (
        ("scan.nii", nibabel.Nifti1Image(ct(), affine)),
        ("scan.nii.gz", nibabel.Nifti1Image(ct(), affine)),
        ("scan.nii.gz", nibabel.Nifti2Image(ct().astype(np.float32) / 3, affine)),
        ("scan.nii", nibabel.Nifti1Image(np.stack([ct(), ct() + 7], axis=-1), affine)),
    ):
        if name == "scan.nii.gz":
            image.header["scl_slope"], image.header["scl_inter"] = 2.0, -3.0
        nibabel.save(image, folder / name)
        four = image.ndim == 4
        size = int(np.prod(image.shape)) * image.get_data_dtype().itemsize
        yield Specimen(f"NIfTI {name[4:]}", name, _held(folder), "channels" if four else "scan", size)
    nibabel.save(nibabel.Nifti1Pair(ct(), affine), folder / "scan.img")
    yield Specimen("NIfTI .hdr + .img", "scan.hdr", _held(folder), "scan", ct().nbytes)


def _itk(folder: Path) -> Iterator[Specimen]:
    image = sitk.GetImageFromArray(np.ascontiguousarray(ct().T))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-4, 5, 6))
    for name, packed in (
        ("scan.mha", False), ("scan.mha", True), ("scan.mhd", False), ("scan.mhd", True),
        ("scan.nrrd", False), ("scan.nrrd", True), ("scan.nhdr", False), ("scan.nhdr", True),
    ):  # fmt: skip
        sitk.WriteImage(image, str(folder / name), packed)
        form = {".mha": "MetaImage .mha", ".mhd": "MetaImage .mhd + .raw", ".nrrd": "NRRD .nrrd"}
        yield Specimen(form.get(name[4:], "NRRD .nhdr + .raw"), name, _held(folder), "scan", ct().nbytes)


def slice_of(index: int, pixels: np.ndarray) -> FileDataset:
    """One DICOM slice."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_IMAGE, f"1.2.3.4.{index + 1}"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CT_IMAGE, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.3.4", "1.2.3"
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientID, data.PatientName = "4711", "Doe^Jane"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelSpacing, data.ImageOrientationPatient = [0.8, 0.7], [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [-10.0, 20.0, 30.0 + 2.5 * index]
    data.SliceThickness = 2.5
    data.RescaleSlope, data.RescaleIntercept, data.InstanceNumber = 1, -24, index + 1
    data.PixelData = pixels.tobytes()
    return data


def _dicom(folder: Path) -> Iterator[Specimen]:
    array = ct()
    for packed in ("", "RLE", "JPEG2000", "JPEG"):
        for index in range(SHAPE[2]):
            data = slice_of(index, np.ascontiguousarray(array[:, :, index].T))
            if packed == "RLE":
                data.compress(RLELossless)
            elif packed:
                _lend_pixels(data, packed, folder)
            data.save_as(folder / f"{index:02d}.dcm", enforce_file_format=True)
        yield Specimen("DICOM series", "", _held(folder), "folder", array.nbytes)
    for packed in (False, True):
        _frames(array, packed).save_as(folder / "frames.dcm", enforce_file_format=True)
        yield Specimen("DICOM multi-frame", "", _held(folder), "folder", array.nbytes)


def _frames(array: np.ndarray, packed: bool) -> FileDataset:
    """All slices in one file."""
    data = slice_of(0, np.ascontiguousarray(array[:, :, 0].T))
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = ENHANCED_CT
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(data, name)

    def macro(**fields: object) -> Sequence:
        item = Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        return Sequence([item])

    data.NumberOfFrames = SHAPE[2]
    data.SharedFunctionalGroupsSequence = macro(
        PixelMeasuresSequence=macro(PixelSpacing=[0.8, 0.7], SliceThickness=2.5),
        PlaneOrientationSequence=macro(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelValueTransformationSequence=macro(RescaleIntercept=-100, RescaleSlope=1, RescaleType="HU"),
    )
    places = [[-10.0, 20.0, 30.0 + 2.5 * index] for index in range(SHAPE[2])]
    frames = [macro(PlanePositionSequence=macro(ImagePositionPatient=place))[0] for place in places]
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.PixelData = np.ascontiguousarray(array.T).tobytes()
    if packed:
        data.compress(RLELossless)
    return data


def _lend_pixels(data: FileDataset, compressor: str, folder: Path) -> None:
    """Pixels compressed by SimpleITK."""
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "lent"))
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(data.pixel_array[None]))
    lender = pydicom.dcmread(folder / "lent")
    (folder / "lent").unlink()
    data.PixelData = lender.PixelData
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = lender.file_meta.TransferSyntaxUID


def _stacks(folder: Path) -> Iterator[Specimen]:
    grey = ((ct().clip(-200, 200) + 200) / 400 * 255).astype(np.uint8)
    for suffix, name in ((".png", "PNG"), (".jpg", "JPEG"), (".tif", "TIFF")):
        for index in range(4):
            pixels = np.ascontiguousarray(grey[:, :, 2 + index].T)
            sitk.WriteImage(sitk.GetImageFromArray(pixels), str(folder / f"{index + 1}{suffix}"))
        yield Specimen(f"{name} slices", "", _held(folder), "scan", grey[:, :, 2:6].nbytes)


def _write_pairs(folder: Path) -> None:
    for place, array in (("imagesTr", ct()), ("labelsTr", label())):
        (folder / place).mkdir(exist_ok=True)
        for name in ("a", "b"):
            ending = f"{name}_0000" if place == "imagesTr" else name
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / place / f"{ending}.nii.gz")


def _lists(folder: Path) -> Iterator[Specimen]:
    rows = [(f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz") for name in "ab"]
    training = [{"image": image, "label": mask} for image, mask in rows]
    labels = {"0": "background", "1": "body"}
    decathlon = {"name": "x", "modality": {"0": "CT"}, "labels": labels, "numTraining": 2, "training": training}
    regions = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    nnunet = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "numTraining": 2}
    entries = [
        {"id": name, "image": [image], "label": mask, "patient": f"p{name}", "split": "train", "fold": 0}
        for name, (image, mask) in zip("ab", rows, strict=True)
    ]
    listed = [{**row, "class": "benign", "labels": ["body"]} for row in entries]
    for row in listed:
        del row["fold"]
    table = ["id,image,label,class,patient,split,labels"]
    table += [f"{row['id']},{row['image'][0]},{row['label']},benign,{row['patient']},train,1" for row in listed]
    for form, name, content in (
        ("dataset.json", "dataset.json", json.dumps(decathlon)),
        ("dataset.json", "dataset.json", json.dumps({**nnunet, "file_ending": ".nii.gz"})),
        (
            "dataset.json",
            "dataset.json",
            json.dumps({**nnunet, "labels": regions, "regions_class_order": [1, 2], "file_ending": ".nii.gz"}),
        ),
        ("CSV list", "cases.csv", "\n".join(table) + "\n"),
        ("JSON list", "cases.json", json.dumps(listed)),
        ("JSON list", "cases.json", json.dumps({"labels": labels, "cases": listed})),
        ("JSON list", "cases.json", json.dumps({"training": entries[:1], "validation": entries[1:]})),
    ):
        _write_pairs(folder)
        (folder / name).write_text(content, encoding="utf-8")
        yield Specimen(form, name, _held(folder), "cases", 2 * (ct().nbytes + label().nbytes))


def _weights(folder: Path) -> Iterator[Specimen]:
    torch.manual_seed(0)
    recipe = create_recipe({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2})
    task = create_task({"name": "segmentation", "patch_size": [8, 8, 12], "feature_dim": 4})
    labels = {0: "background", 1: "body"}
    module = task.build(recipe, labels)
    card: dict[str, Any] = {
        "backbone": to_named(recipe, BACKBONES),
        "input_multiple": list(recipe.input_multiple),
        "orientation": "RAS+",
        "spacing_mm": [1.0, 1.0, 1.5],
        "intensity": {"kind": "window", "window": [-160.0, 240.0]},
        "data_digest": "ab" * 32,
        "mim3d_version": "0.1.0",
        "task": to_named(task, TASKS),
        "labels": {str(value): name for value, name in labels.items()},
        "step": 7,
        "scores": {"dice": 0.5},
    }
    seen = folder / "seen.json"
    seen.write_text('{"format": 1, "complete": true, "scans": []}')
    save_network(folder / "segmenter", module, card, beside=[seen])
    seen.unlink()
    held = _held(folder)
    yield Specimen("card.json + safetensors", "segmenter", held, "network", len(held["segmenter/model.safetensors"]))


def _others(folder: Path) -> Iterator[Specimen]:
    torch.manual_seed(0)
    state = {f"encoder.{name}": torch.randn(4, 3, 2) for name in ("weight", "bias")}
    for legacy in (False, True):
        content = {"model": state, "epoch": 3}
        torch.save(content, folder / "published.pt", _use_new_zipfile_serialization=not legacy)
        yield Specimen("torch checkpoint", "published.pt", _held(folder), "state", 192)
    plan = Plan(spacing_mm=(1.0, 1.0, 2.5), intensity=Intensity(), patch_size=(64, 64, 32), reasons={"patch_size": "x"})
    write_yaml(folder / "plan.yaml", to_mapping(plan))
    yield Specimen("plan.yaml", "plan.yaml", _held(folder), "plan", 10_000)
    manifest = {"command": "pretrain", "settings": {"seed": 1, "data": "d"}, "inputs": {}, "derived": {"memory": 1.5}}
    (folder / "run").mkdir()
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    write_yaml(folder / "run" / "config.yaml", {"command": "pretrain", "method": {"name": "MiM"}, "seed": 1})
    yield Specimen("run folder", "run", _held(folder), "run", 10_000)


def _cache(folder: Path) -> Iterator[Specimen]:
    for packed in (None, 1.0):
        data = folder / "data"
        data.mkdir(exist_ok=True)
        _write_pairs(data)
        out = folder / "cache"
        build_cache(read_cases(data), out, Preprocessing(), pack_gb=packed)
        (out / "lock").unlink(missing_ok=True)
        held = {name: content for name, content in _held(folder).items() if name.startswith("cache/")}
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        yield Specimen("cache", "cache", held, "cache", 3 * (ct().nbytes + label().nbytes))


_MAKERS: tuple[Callable[[Path], Iterator[Specimen]], ...] = (
    _nifti, _itk, _dicom, _stacks, _lists, _weights, _others, _cache,
)  # fmt: skip
