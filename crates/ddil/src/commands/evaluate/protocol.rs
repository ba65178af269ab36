//! Documented protocols: what they set, and what they require.

use anyhow::ensure;
use ddil_evaluate::EvaluationPrompts;

use crate::cli::{CaptionChoice, EvaluateArgs, Protocol};

/// Images, prompts and drawn images of COCO 2017's validation set.
const COCO_2017: u64 = 5000;
/// Both sides of images, in pixels, before a network's own conversion.
const SIDE: u32 = 512;

/// Checks that the options and the prompts are those of the protocol.
pub(super) fn ensure(args: &EvaluateArgs, prompts: &EvaluationPrompts) -> anyhow::Result<()> {
    let options = &args.prompting;
    let Some(Protocol::Coco2017) = options.protocol else { return Ok(()) };
    let protocol = Protocol::Coco2017.as_str();
    ensure!(
        options.captions == CaptionChoice::First && prompts.set.images_per_prompt == 1,
        "--protocol {protocol}: expected the first caption of each image and one image of it; leave out --captions and \
         --images-per-prompt"
    );
    let is_named = prompts.prompts.iter().all(|prompt| prompt.image.is_some());
    ensure!(
        prompts.set.count == COCO_2017 && is_named,
        "--protocol {protocol}: {} has {} prompts{}; expected COCO's captions_val2017.json, with {COCO_2017} images",
        prompts.set.file,
        prompts.set.count,
        if is_named { "" } else { " without names of images" }
    );
    ensure!(
        prompts.set.is_plain(),
        "--protocol {protocol}: expected images of the captions alone; leave out --negative-prompt, --prompt-prefix and \
         --prompt-suffix"
    );
    ensure!(
        args.extractor.is_some() && args.reference.is_some() && options.clip.is_some(),
        "--protocol {protocol}: expected --reference (the folder val2017, or statistics of it), --extractor \
         inception-2015-12-05.pt and --clip FOLDER"
    );
    ensure!(
        args.extractor_input.is_none(),
        "--protocol {protocol} sets the input of the extractor; leave out --extractor-input"
    );
    Ok(())
}

/// Checks that images of this height and width are not smaller than the protocol's.
pub(super) fn ensure_size(args: &EvaluateArgs, [height, width]: [i64; 2]) -> anyhow::Result<()> {
    let Some(protocol) = args.prompting.protocol else { return Ok(()) };
    ensure!(
        height.min(width) >= i64::from(SIDE),
        "--protocol {}: images are {SIDE}x{SIDE} pixels, and these of {width}x{height} would be enlarged",
        protocol.as_str()
    );
    Ok(())
}

/// The input of the extractor: of the command line, or of the protocol.
///
/// That of the protocol: the shorter side to 512 pixels, the central square, rounded to 8 bits, for real and drawn images
/// alike; then as clean-fid.
pub(super) fn extractor_input(args: &EvaluateArgs) -> Option<String> {
    match args.prompting.protocol {
        Some(Protocol::Coco2017) => Some(format!(
            r#"{{"first":"bicubic-antialias-{SIDE}-crop-{SIDE}","resize":"bicubic-antialias-299x299","range":"byte"}}"#
        )),
        None => args.extractor_input.clone(),
    }
}
