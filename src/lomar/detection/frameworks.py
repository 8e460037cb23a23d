"""What the two frameworks of the paper's Table 2 do differently: detectron2's ViTDet, the ViTAE repository's port."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Framework:
    """Choices of a detector and its training.

    Args:
        about: whose they are.
        scaled_query: whether the decomposed position's query is divided by sqrt(d).
        final_norm: whether the encoder's last norm comes before the pyramid.
        halving_pyramid: whether the pyramid's deconvolutions halve the channels.
        neck_eps: of the norms after the pyramid's convolutions.
        proposal_norm: whether the convolutions before the proposals are normalised.
        position_resized_once: whether a table of absolute positions is made for the image's grid at the start, or
            resized in every pass.
        low_quality_matches: whether an object that no proposal meets well takes its best one.
        decays_vectors: whether biases, norms of feature maps and tables of relative positions are decayed.
        flip_first, shared_offset: of large-scale jitter: whether an image is mirrored before it is cropped; whether one
            random number places the crop along both axes.
        least_box_px: objects whose box is not wider and higher than that after a crop are left out.
        warmup_factor: of the first rate over the highest.
        milestones: shares of the steps after which the rate is a tenth, and a hundredth.
    """

    about: str
    scaled_query: bool
    final_norm: bool
    halving_pyramid: bool
    neck_eps: float
    proposal_norm: bool
    position_resized_once: bool
    low_quality_matches: bool
    decays_vectors: bool
    flip_first: bool
    shared_offset: bool
    least_box_px: float
    warmup_factor: float
    milestones: tuple[float, float]


FRAMEWORKS = {
    "vitdet": Framework(
        about="detectron2, projects/ViTDet: 184,375 steps of 64 images, 100 epochs of COCO",
        scaled_query=False,
        final_norm=False,
        halving_pyramid=True,
        neck_eps=1e-6,
        proposal_norm=False,
        position_resized_once=False,
        low_quality_matches=False,
        decays_vectors=True,
        flip_first=True,
        shared_offset=True,
        least_box_px=1e-5,
        warmup_factor=0.001,
        milestones=(163_889 / 184_375, 177_546 / 184_375),
    ),
    "vitae": Framework(
        about="ViTAE-Transformer/ViTDet, on mmdetection: 25 epochs of COCO repeated four times",
        scaled_query=True,
        final_norm=True,
        halving_pyramid=False,
        neck_eps=1e-5,
        proposal_norm=True,
        position_resized_once=True,
        low_quality_matches=True,
        decays_vectors=False,
        flip_first=False,
        shared_offset=False,
        least_box_px=0.01,
        warmup_factor=0.067,
        milestones=(22 / 25, 24 / 25),
    ),
}
