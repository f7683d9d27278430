"""The formats in which label maps are written, by the names that commands and functions have."""

from typing import Literal, get_args

Format = Literal["nifti", "nrrd", "dicom-seg", "dicom-labelmap", "dicom-rtstruct"]
FORMATS: tuple[Format, ...] = get_args(Format)
FORMAT_ENDINGS: dict[Format, str] = {
  "nifti": ".nii.gz", "nrrd": ".seg.nrrd", "dicom-seg": ".seg.dcm",
  "dicom-labelmap": ".labelmap.dcm", "dicom-rtstruct": ".rtstruct.dcm"}
HELP = ("of label maps; nrrd: with names and colours, for 3D Slicer; dicom-...: of what was read "
        "from DICOM, a segmentation (seg, or labelmap, its newer kind) or outlines (rtstruct)")
