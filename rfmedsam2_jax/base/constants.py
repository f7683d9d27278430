"""Numbers of SAM 2 that several rooms need; here, as data workers import no network for them."""

LOGIT_LIMIT = 32.0  # mask prompts are clamped to +-this (sam2_image_predictor.py)
# Statistics of SAM 2's input (sam2/utils/transforms.py), the usual ones of ImageNet.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
