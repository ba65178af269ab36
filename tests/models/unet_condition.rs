//! `UNet2DConditionModel` against recorded outputs of diffusers, and its errors.

use std::collections::BTreeMap;

use ddil_core::Conditioning;
use ddil_libtorch::ArgumentError;
use ddil_libtorch::Autocast;
use ddil_models::{
    ConditionDownBlockType, ConditionMidBlockType, ConditionUpBlockType, Error, NetworkConfig,
    PerLevel, Placement, TransformerLayers, UNet2DConditionConfig, UNet2DConditionInputs,
    UNet2DConditionModel, UnknownKeys, weights,
};
use tch::{Device, Kind, Tensor, kind};

use crate::common::{CONDITION_GOLDEN, TestResult, golden, relative_error};

/// Relative to the largest value, in `Float`.
const TOLERANCE: f64 = 1e-5;

pub(crate) type Recorded = BTreeMap<String, Tensor>;

pub(crate) fn load(name: &str, placement: Placement) -> ddil_models::Result<UNet2DConditionModel> {
    let folder = golden(name);
    UNet2DConditionConfig::from_file(folder.join("config.json"), UnknownKeys::Refuse)?
        .build_from(placement, folder.join("diffusion_pytorch_model.safetensors"))
}

pub(crate) fn expected(name: &str) -> ddil_models::Result<Recorded> {
    weights::read_all(golden(name).join("expected.safetensors"))
}

pub(crate) fn inputs(recorded: &Recorded) -> UNet2DConditionInputs<'_> {
    UNet2DConditionInputs {
        encoder_hidden_states: recorded.get("encoder_hidden_states"),
        encoder_attention_mask: recorded.get("encoder_attention_mask"),
        text_embeds: recorded.get("text_embeds"),
        time_ids: recorded.get("time_ids"),
        class_labels: recorded.get("class_labels"),
        guidance_weight: recorded.get("guidance_weight"),
    }
}

pub(crate) fn forward(
    unet: &UNet2DConditionModel,
    recorded: &Recorded,
) -> ddil_models::Result<Tensor> {
    unet.forward(&recorded["sample"], &recorded["timesteps"], inputs(recorded))
}

#[test]
fn outputs_are_those_of_diffusers() -> TestResult {
    for channels_last in [false, true] {
        for name in CONDITION_GOLDEN {
            let unet = load(name, Placement { channels_last, ..Placement::default() })?;
            let recorded = expected(name)?;
            let (sample, t) = (&recorded["sample"], &recorded["timesteps"]);
            let output = unet.forward_with_features(sample, t, inputs(&recorded))?;
            for (part, found) in [("output", &output.sample), ("features", &output.features)] {
                let error = relative_error(found, &recorded[part]);
                println!("{name} {part}, channels last {channels_last}: {error:.1e}");
                assert!(error <= TOLERANCE, "{name} {part}: {error}");
            }
            assert_eq!(unet.features(sample, t, inputs(&recorded))?, output.features);
        }
    }
    Ok(())
}

/// Norm and product with cos(1), cos(2), .., as `tools/record/record_unet.py` has them.
pub(crate) fn summary(gradient: &Tensor) -> [f64; 2] {
    let gradient = gradient.to_kind(Kind::Double).contiguous().view([-1]);
    let vector = Tensor::arange_start(1, gradient.size()[0] + 1, kind::DOUBLE_CPU).cos();
    [gradient.norm().double_value(&[]), gradient.dot(&vector).double_value(&[])]
}

/// Largest difference of a summary from the recorded one, relative to the norm of that gradient.
fn worst_gradient(name: &str, placement: Placement) -> Result<f64, Box<dyn std::error::Error>> {
    let unet = load(name, placement)?;
    let mut recorded = expected(name)?;
    let sample = recorded["sample"].to_kind(placement.kind);
    recorded.insert("sample".into(), sample);
    forward(&unet, &recorded)?.square().sum(placement.kind).backward();
    let mut named = unet.parameters().named();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    let rows = &recorded["gradients"];
    assert_eq!(rows.size(), [named.len() as i64, 2]);
    let largest = rows.select(1, 0).max().double_value(&[]);
    let mut worst = 0.0_f64;
    for (i, (parameter, tensor)) in named.iter().enumerate() {
        let row = [0, 1].map(|j| rows.double_value(&[i as i64, j]));
        let gradient = tensor.grad();
        assert!(gradient.defined(), "{name} {parameter} has no gradient");
        let found = summary(&gradient);
        // Zero but for rounding: a bias in front of a norm that takes the mean away, or of all keys of an attention.
        if row[0] < 1e-8 * largest {
            assert!(found[0] < 1e-6 * largest, "{name} {parameter}: {found:?}");
            continue;
        }
        for (found, expected) in found.into_iter().zip(row) {
            let error = (found - expected).abs() / row[0];
            assert!(error < 1.0, "{name} {parameter}: {found} and {expected}");
            worst = worst.max(error);
        }
    }
    Ok(worst)
}

#[test]
fn gradients_of_every_parameter_are_those_of_diffusers() -> TestResult {
    for name in CONDITION_GOLDEN {
        // diffusers pools a text with a softmax in `Float` for any kind.
        let double = if name == "unet_condition_text" { 1e-6 } else { 1e-10 };
        for (kind, channels_last, tolerance) in
            [(Kind::Float, false, 1e-4), (Kind::Float, true, 1e-4), (Kind::Double, false, double)]
        {
            let placement = Placement { kind, channels_last, ..Placement::default() };
            let error = worst_gradient(name, placement)?;
            println!("{name} gradients, {kind:?}, channels last {channels_last}: {error:.1e}");
            assert!(error <= tolerance, "{name} {kind:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn half_precision_and_autocast_stay_close() -> TestResult {
    for name in CONDITION_GOLDEN {
        // The embeddings of that network alone are six layers deep.
        let tolerance = if name == "unet_condition_text" { 3e-2 } else { 2.5e-2 };
        let recorded = expected(name)?;
        for channels_last in [false, true] {
            let kind = Kind::BFloat16;
            let half = load(name, Placement { kind, channels_last, ..Placement::default() })?;
            let sample = recorded["sample"].to_kind(kind);
            let output = half.forward(&sample, &recorded["timesteps"], inputs(&recorded))?;
            assert_eq!(output.kind(), kind);
            let error = relative_error(&output.to_kind(Kind::Float), &recorded["output"]);
            println!("{name} bf16, channels last {channels_last}: {error:.1e}");
            assert!(error <= tolerance, "{name}: {error}");

            let whole = load(name, Placement { channels_last, ..Placement::default() })?;
            let output = {
                let _autocast = Autocast::new(Device::Cpu, kind)?;
                forward(&whole, &recorded)?
            };
            let error = relative_error(&output.to_kind(Kind::Float), &recorded["output"]);
            println!("{name} autocast, channels last {channels_last}: {error:.1e}");
            assert!(error <= tolerance, "{name}: {error}");
            output.sum(Kind::Float).backward();
            let gradient = whole.parameters().get("conv_in.weight").expect("it has one").grad();
            assert_eq!(gradient.kind(), Kind::Float);
        }
    }
    Ok(())
}

/// Two levels with cross attention on 8 channels, a text of width 12.
fn small() -> UNet2DConditionConfig {
    UNet2DConditionConfig {
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![ConditionDownBlockType::CrossAttnDownBlock2D; 2],
        up_block_types: vec![ConditionUpBlockType::CrossAttnUpBlock2D; 2],
        block_out_channels: vec![8, 8],
        layers_per_block: PerLevel::All(1),
        norm_num_groups: 4,
        attention_head_dim: PerLevel::All(2),
        cross_attention_dim: PerLevel::All(12),
        ..UNet2DConditionConfig::default()
    }
}

fn text(batch: i64) -> Tensor {
    Tensor::randn([batch, 5, 12], kind::FLOAT_CPU)
}

/// Masked tokens are as good as absent, and the order of tokens makes no difference.
#[test]
fn a_mask_hides_tokens() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    let (x_t, t) = (Tensor::randn([2, 1, 6, 6], kind::FLOAT_CPU), Tensor::from(500_i64));
    let text = text(2);
    let evaluate = |text: &Tensor, mask: Option<&Tensor>| {
        let inputs = UNet2DConditionInputs {
            encoder_attention_mask: mask,
            ..UNet2DConditionInputs::text(text)
        };
        unet.forward(&x_t, &t, inputs)
    };
    let mask = Tensor::from_slice2(&[[true, true, true, false, false]; 2]);
    let short = evaluate(&text.narrow(1, 0, 3).contiguous(), None)?;
    assert!(relative_error(&evaluate(&text, Some(&mask))?, &short) < TOLERANCE);
    let numbers = mask.to_kind(Kind::Int64);
    assert!(relative_error(&evaluate(&text, Some(&numbers))?, &short) < TOLERANCE);
    let whole = evaluate(&text, None)?;
    assert!(relative_error(&whole, &short) > 1e-3);
    assert!(relative_error(&evaluate(&text.flip([1]), None)?, &whole) < TOLERANCE);
    Ok(())
}

#[test]
fn samples_of_a_batch_are_independent() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    let (x_t, t) = (Tensor::randn([3, 1, 7, 5], kind::FLOAT_CPU), Tensor::from(500_i64));
    let text = text(3);
    let whole = unet.forward(&x_t, &t, UNet2DConditionInputs::text(&text))?;
    let part = text.narrow(0, 1, 1);
    let one = unet.forward(&x_t.narrow(0, 1, 1), &t, UNet2DConditionInputs::text(&part))?;
    assert_eq!(one.size(), [1, 1, 7, 5]);
    assert!(relative_error(&one, &whole.narrow(0, 1, 1)) < TOLERANCE);
    Ok(())
}

#[test]
fn gradients_reach_sample_and_text_and_no_frozen_parameter() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    unet.parameters().set_trainable(false);
    let x_t = Tensor::randn([2, 1, 4, 4], kind::FLOAT_CPU).set_requires_grad(true);
    let text = text(2).set_requires_grad(true);
    let output = unet.forward(&x_t, &Tensor::from(9_i64), UNet2DConditionInputs::text(&text))?;
    output.square().sum(Kind::Float).backward();
    for input in [&x_t, &text] {
        assert!(input.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    }
    assert!(unet.parameters().named().iter().all(|(_, parameter)| !parameter.grad().defined()));
    Ok(())
}

/// The features that a critic and its discriminator share: one pass, gradients from both ends.
#[test]
fn gradients_come_back_from_output_and_features_of_one_pass() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    let x_t = Tensor::randn([2, 1, 4, 4], kind::FLOAT_CPU).set_requires_grad(true);
    let text = text(2);
    let inputs = UNet2DConditionInputs::text(&text);
    let pass = unet.forward_with_features(&x_t, &Tensor::from(5_i64), inputs)?;
    assert_eq!(pass.features.size(), [2, 8, 2, 2]);
    let gradient = |of: &Tensor| {
        Tensor::run_backward(&[of.square().sum(Kind::Float)], &[&x_t], true, false).remove(0)
    };
    let (output, features) = (gradient(&pass.sample), gradient(&pass.features));
    assert!(features.abs().sum(Kind::Float).double_value(&[]) > 0.0);
    (pass.sample.square().sum(Kind::Float) + pass.features.square().sum(Kind::Float)).backward();
    assert!(relative_error(&x_t.grad(), &(output + features)) < 1e-5);
    Ok(())
}

/// At first the weight has no effect, but its gradient is not zero.
#[test]
fn a_fresh_guidance_embedding_changes_nothing() -> TestResult {
    let guided = UNet2DConditionConfig { time_cond_proj_dim: Some(16), ..small() };
    let student = guided.build(Placement::default(), 3)?;
    let teacher = small().build(Placement::default(), 3)?;
    let (x_t, t) = (Tensor::randn([2, 1, 4, 4], kind::FLOAT_CPU), Tensor::from(7_i64));
    let (text, weight) = (text(2), Tensor::from_slice(&[7.5_f32, 0.3]));
    let inputs = UNet2DConditionInputs::text(&text);
    let weighted = UNet2DConditionInputs { guidance_weight: Some(&weight), ..inputs };
    let output = student.forward(&x_t, &t, weighted)?;
    assert_eq!(output, teacher.forward(&x_t, &t, inputs)?);
    output.square().sum(Kind::Float).backward();
    let projection =
        student.parameters().get("time_embedding.cond_proj.weight").expect("it has one");
    assert_eq!(projection.size(), [8, 16]);
    assert!(projection.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    Ok(())
}

#[test]
fn dropout_drops_in_training_alone() -> TestResult {
    let unet = load("unet_condition_sd15", Placement::default())?;
    let recorded = expected("unet_condition_sd15")?;
    let evaluated = forward(&unet, &recorded)?;
    unet.set_training(true);
    assert_ne!(forward(&unet, &recorded)?, evaluated);
    unet.set_training(false);
    assert_eq!(forward(&unet, &recorded)?, evaluated);
    Ok(())
}

/// A student with fewer channels starts from the teacher's: of the feed-forward layer each half gives its part.
#[test]
fn a_narrower_student_copies_part_of_both_halves() -> TestResult {
    let teacher = small().build(Placement::default(), 0)?;
    let config =
        UNet2DConditionConfig { block_out_channels: vec![4, 4], norm_num_groups: 2, ..small() };
    let student = config.build(Placement::default(), 1)?;
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert!(matched.fresh.is_empty(), "{matched}");
    let name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias";
    let [theirs, ours] =
        [&teacher, &student].map(|unet| unet.parameters().get(name).expect("it is there"));
    assert_eq!((theirs.size(), ours.size()), (vec![64], vec![32]));
    let halves = Tensor::cat(&[theirs.narrow(0, 0, 16), theirs.narrow(0, 32, 16)], 0);
    assert_eq!(*ours, halves);
    Ok(())
}

fn refusal(unet: &UNet2DConditionModel, inputs: UNet2DConditionInputs<'_>) -> Error {
    let x_t = Tensor::zeros([3, unet.config().in_channels.into(), 8, 8], kind::FLOAT_CPU);
    unet.forward(&x_t, &Tensor::from(1_i64), inputs).expect_err("it does not fit")
}

#[test]
fn missing_and_unexpected_parts_are_named() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    let (text, vector) = (text(3), Tensor::zeros([3, 10], kind::FLOAT_CPU));
    let inputs = UNet2DConditionInputs::text(&text);
    let none = UNet2DConditionInputs::default();
    let message = refusal(&unet, none).to_string();
    assert!(message.contains("requires `encoder_hidden_states`, which is missing"), "{message}");
    for (name, inputs) in [
        ("text_embeds", UNet2DConditionInputs { text_embeds: Some(&vector), ..inputs }),
        ("time_ids", UNet2DConditionInputs { time_ids: Some(&vector), ..inputs }),
    ] {
        let message = refusal(&unet, inputs).to_string();
        assert!(message.contains(&format!("does not take `{name}`")), "{message}");
    }
    let labelled = UNet2DConditionInputs { class_labels: Some(&vector), ..inputs };
    assert!(matches!(refusal(&unet, labelled), Error::UnexpectedPart { part: "class_labels", .. }));
    let weighted = UNet2DConditionInputs { guidance_weight: Some(&vector), ..inputs };
    assert!(matches!(
        refusal(&unet, weighted),
        Error::UnexpectedPart { part: "guidance_weight", .. }
    ));

    let deaf = UNet2DConditionConfig {
        down_block_types: vec![ConditionDownBlockType::DownBlock2D; 2],
        mid_block_type: Some(ConditionMidBlockType::UNetMidBlock2D),
        up_block_types: vec![ConditionUpBlockType::UpBlock2D; 2],
        ..small()
    }
    .build(Placement::default(), 0)?;
    assert!(deaf.conditioning_fields().is_empty());
    let message = refusal(&deaf, inputs).to_string();
    assert!(message.contains("does not take `encoder_hidden_states`"), "{message}");
    let mask = UNet2DConditionInputs { encoder_attention_mask: Some(&vector), ..none };
    let message = refusal(&deaf, mask).to_string();
    assert!(message.contains("does not take `encoder_attention_mask`"), "{message}");
    Ok(())
}

#[test]
fn a_pooled_text_needs_both_parts() -> TestResult {
    let unet = load("unet_condition_sdxl", Placement::default())?;
    let recorded = expected("unet_condition_sdxl")?;
    let fields = ["encoder_hidden_states", "text_embeds", "time_ids"];
    assert_eq!(unet.conditioning_fields(), fields);
    let inputs = inputs(&recorded);
    for (name, inputs) in [
        ("text_embeds", UNet2DConditionInputs { text_embeds: None, ..inputs }),
        ("time_ids", UNet2DConditionInputs { time_ids: None, ..inputs }),
    ] {
        let error = refusal(&unet, inputs);
        let found = matches!(error, Error::MissingPart { part, .. } if part == name);
        assert!(found, "{error}");
    }
    let five = recorded["time_ids"].narrow(1, 0, 5);
    let inputs = UNet2DConditionInputs { time_ids: Some(&five), ..inputs };
    let message = refusal(&unet, inputs).to_string();
    assert!(message.contains("30 features") && message.contains("together 46"), "{message}");
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() -> TestResult {
    let unet = small().build(Placement::default(), 0)?;
    let text = text(3);
    let inputs = UNet2DConditionInputs::text(&text);
    for shape in [&[3, 1, 8][..], &[3, 2, 8, 8], &[3, 1, 0, 8]] {
        let x_t = Tensor::zeros(shape, kind::FLOAT_CPU);
        let error = unet.forward(&x_t, &Tensor::from(1_i64), inputs);
        assert!(
            matches!(error, Err(Error::Argument(ArgumentError::Shape { name: "sample", .. }))),
            "{shape:?}"
        );
    }
    for shape in [&[3, 5][..], &[2, 5, 12], &[3, 0, 12], &[3, 5, 11]] {
        let text = Tensor::zeros(shape, kind::FLOAT_CPU);
        let message = refusal(&unet, UNet2DConditionInputs::text(&text)).to_string();
        assert!(message.contains("expected [3, tokens, 12]"), "{message}");
    }
    let tokens = text.to_kind(Kind::Int64);
    let error = refusal(&unet, UNet2DConditionInputs::text(&tokens));
    assert!(matches!(
        error,
        Error::Argument(ArgumentError::Kind { name: "encoder_hidden_states", .. })
    ));
    let mask = Tensor::ones([3, 4], kind::FLOAT_CPU);
    let masked = UNet2DConditionInputs { encoder_attention_mask: Some(&mask), ..inputs };
    let message = refusal(&unet, masked).to_string();
    assert!(message.contains("`encoder_attention_mask` has shape [3, 4]"), "{message}");

    // Another kind than the parameters: libtorch's reason, not its stack trace.
    let x_t = Tensor::zeros([3, 1, 8, 8], kind::DOUBLE_CPU);
    let error = unet.forward(&x_t, &Tensor::from(1_i64), inputs).expect_err("Double");
    let message = error.to_string();
    assert!(message.starts_with("UNet2DConditionModel::forward: "), "{message}");
    assert!(!message.contains('\n'), "{message}");
    Ok(())
}

#[test]
fn projected_labels_have_a_width() -> TestResult {
    let unet = load("unet_condition_lcm", Placement::default())?;
    let recorded = expected("unet_condition_lcm")?;
    let labels = Tensor::zeros([3, 4], kind::FLOAT_CPU);
    let inputs = UNet2DConditionInputs { class_labels: Some(&labels), ..inputs(&recorded) };
    let message = refusal(&unet, inputs).to_string();
    assert!(message.contains("`class_labels` has shape [3, 4]; expected [3, 5]"), "{message}");
    Ok(())
}

#[test]
fn one_number_of_blocks_goes_for_every_transformer() -> TestResult {
    let config = UNet2DConditionConfig {
        transformer_layers_per_block: TransformerLayers::All(2),
        ..small()
    };
    let names: Vec<_> = config.parameter_shapes()?.into_iter().map(|(name, _)| name).collect();
    for place in ["down_blocks.0", "mid_block", "up_blocks.1"] {
        let last = format!("{place}.attentions.0.transformer_blocks.1.norm1.bias");
        assert!(names.contains(&last), "{last}");
    }
    assert!(!names.iter().any(|name| name.contains("transformer_blocks.2")));
    Ok(())
}

#[test]
fn every_part_of_a_conditioning_is_passed_on() {
    let part = |value: f64| Tensor::full([1, 1], value, kind::FLOAT_CPU);
    let conditioning: Conditioning =
        Conditioning::STANDARD.into_iter().zip([0.0, 1.0, 2.0, 3.0, 4.0].map(part)).collect();
    let inputs = UNet2DConditionInputs::from(&conditioning);
    let parts = [
        inputs.class_labels,
        inputs.encoder_hidden_states,
        inputs.text_embeds,
        inputs.time_ids,
        inputs.guidance_weight,
    ];
    let values = parts.map(|part| part.map(|part| part.double_value(&[0, 0])));
    assert_eq!(values, [Some(0.0), Some(1.0), Some(2.0), Some(3.0), Some(4.0)]);
    assert!(inputs.encoder_attention_mask.is_none());
}
