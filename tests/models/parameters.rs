//! `Parameters`: initialisation and copies.

use ddil_models::{
    DownBlockType, Error, NetworkConfig, Placement, UNet2DConfig, UNet2DModel, UpBlockType,
};
use tch::{Device, Kind, Tensor};

use crate::common::TestResult;

fn config() -> UNet2DConfig {
    UNet2DConfig {
        down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
        up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
        block_out_channels: vec![16, 16],
        layers_per_block: 1,
        norm_num_groups: 4,
        num_class_embeds: Some(50),
        ..UNet2DConfig::default()
    }
}

fn build(placement: Placement, seed: u64) -> ddil_models::Result<UNet2DModel> {
    config().build(placement, seed)
}

fn get<'a>(unet: &'a UNet2DModel, name: &str) -> &'a Tensor {
    unet.parameters().get(name).expect(name)
}

#[test]
fn fresh_values_are_distributed_as_pytorch_would() -> TestResult {
    let unet = build(Placement::default(), 0)?;
    // Uniform in 1/sqrt(fan_in), whose standard deviation is the bound over the square root of 3.
    for (name, fan_in) in [
        ("conv_in.weight", 3.0 * 9.0),
        ("mid_block.resnets.0.conv1.weight", 16.0 * 9.0),
        ("mid_block.resnets.0.conv1.bias", 16.0 * 9.0),
        ("time_embedding.linear_1.weight", 16.0),
        ("mid_block.attentions.0.to_out.0.weight", 16.0),
    ] {
        let bound = 1.0 / f64::sqrt(fan_in);
        let values = get(&unet, name);
        assert!(values.abs().max().double_value(&[]) <= bound, "{name}");
        if values.numel() > 200 {
            let std = values.std(true).double_value(&[]);
            assert!((std / (bound / 3.0_f64.sqrt()) - 1.0).abs() < 0.15, "{name}: {std}");
            assert!(values.mean(Kind::Float).double_value(&[]).abs() < bound / 5.0, "{name}");
        }
    }
    let table = get(&unet, "class_embedding.weight");
    assert_eq!(table.size(), [50, 64]);
    assert!((table.std(true).double_value(&[]) - 1.0).abs() < 0.05);
    let [scale, shift] = ["weight", "bias"].map(|p| get(&unet, &format!("conv_norm_out.{p}")));
    assert_eq!(*scale, scale.ones_like());
    assert_eq!(*shift, shift.zeros_like());
    Ok(())
}

#[test]
fn a_seed_determines_everything() -> TestResult {
    let (first, again, other) = (
        build(Placement::default(), 3)?,
        build(Placement::default(), 3)?,
        build(Placement::default(), 4)?,
    );
    let channels_last = build(Placement { channels_last: true, ..Placement::default() }, 3)?;
    for (name, tensor) in first.parameters().named() {
        assert_eq!(tensor, *get(&again, &name), "{name}");
        assert_eq!(tensor, *get(&channels_last, &name), "{name}");
        if !name.contains("norm") {
            assert_ne!(tensor, *get(&other, &name), "{name}");
        }
    }
    Ok(())
}

#[test]
fn seeds_count_to_their_last_bit_and_layers_do_not_share_values() -> TestResult {
    let first = build(Placement::default(), 1)?;
    let high = build(Placement::default(), 1 | 1 << 63)?;
    assert_ne!(get(&first, "conv_in.weight"), get(&high, "conv_in.weight"));
    let queries = get(&first, "mid_block.attentions.0.to_q.weight");
    assert_ne!(queries, get(&first, "mid_block.attentions.0.to_k.weight"));
    Ok(())
}

#[test]
fn another_layer_leaves_the_others_as_they_were() -> TestResult {
    let with = build(Placement::default(), 0)?;
    let without =
        UNet2DConfig { num_class_embeds: None, ..config() }.build(Placement::default(), 0)?;
    assert_eq!(get(&with, "conv_out.weight"), get(&without, "conv_out.weight"));
    assert_eq!(with.parameters().num_values() - without.parameters().num_values(), 50 * 64);
    Ok(())
}

#[test]
fn building_leaves_the_global_stream_alone() -> TestResult {
    tch::manual_seed(0);
    let before = ddil_libtorch::default_generator_state(Device::Cpu)?;
    build(Placement::default(), 0)?;
    assert_eq!(ddil_libtorch::default_generator_state(Device::Cpu)?, before);
    Ok(())
}

#[test]
fn weights_have_the_requested_memory_layout() -> TestResult {
    let unet = build(Placement { channels_last: true, ..Placement::default() }, 0)?;
    assert!(ddil_libtorch::is_channels_last(get(&unet, "conv_in.weight")));
    assert!(get(&unet, "conv_in.weight").is_leaf());
    Ok(())
}

#[test]
fn copies_carry_values_and_no_handles() -> TestResult {
    let source = build(Placement::default(), 0)?;
    let target =
        build(Placement { kind: Kind::Double, channels_last: true, ..Placement::default() }, 1)?;
    target.parameters().copy_from(source.parameters())?;
    for (name, tensor) in target.parameters().named() {
        assert_eq!(tensor.kind(), Kind::Double);
        assert_eq!(tensor, get(&source, &name).to_kind(Kind::Double), "{name}");
    }
    let before = get(&target, "conv_in.bias").copy();
    {
        let _no_grad = tch::no_grad_guard();
        let _ = get(&source, "conv_in.bias").shallow_clone().zero_();
    }
    assert_eq!(*get(&target, "conv_in.bias"), before);
    Ok(())
}

#[test]
fn copies_between_different_networks_are_refused_whole() -> TestResult {
    let target = build(Placement::default(), 0)?;
    let before = get(&target, "conv_in.weight").copy();
    let source = UNet2DConfig { num_class_embeds: None, out_channels: 6, ..config() }
        .build(Placement::default(), 1)?;
    let error = target.parameters().copy_from(source.parameters());
    let Err(Error::ParametersDiffer { problems }) = error else { panic!("{error:?}") };
    assert_eq!(problems.missing, ["class_embedding.weight"]);
    let misshapen: Vec<_> = problems.misshapen.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(misshapen, ["conv_out.weight", "conv_out.bias"]);
    assert_eq!(*get(&target, "conv_in.weight"), before);
    Ok(())
}
