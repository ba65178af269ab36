//! Activation checkpointing of both U-Nets: the plain pass's numbers, with less memory.

use ddil_libtorch::Autocast;
use ddil_models::{
    DownBlockType, Lora, LoraConfig, MlpConfig, Model, ModelConfig, NetworkConfig, Placement,
    UNet2DConfig, UnknownKeys, UpBlockType,
};
use ddil_trainer::memory::{Activations, PassShape};
use tch::{Device, Kind, Tensor, kind};

use crate::common::{CONDITION_GOLDEN, GOLDEN, TestResult, conditioning, golden};
use crate::unet_condition::{Recorded, expected};

type Gradients = Vec<(String, Tensor)>;

fn load(name: &str, channels_last: bool) -> ddil_models::Result<Model> {
    let placement = Placement { channels_last, ..Placement::default() };
    Model::from_folder(golden(name), placement, UnknownKeys::Refuse)
}

/// Output and gradients of sample and parameters; `between` happens between the passes.
fn one_pass(
    model: &Model,
    parameters: &ddil_models::Parameters,
    recorded: &Recorded,
    autocast: Option<Kind>,
    between: impl FnOnce() -> ddil_models::Result<()>,
) -> ddil_models::Result<Gradients> {
    tch::manual_seed(11);
    for (_, mut tensor) in parameters.learned() {
        tensor.zero_grad();
    }
    let sample = recorded["sample"].copy().set_requires_grad(true);
    let output = {
        let _autocast = autocast.map(|kind| Autocast::new(Device::Cpu, kind)).transpose()?;
        model.forward(&sample, &recorded["timesteps"], &conditioning(recorded))?
    };
    between()?;
    let loss = output.to_kind(Kind::Float).square().sum(Kind::Float);
    loss.f_backward().map_err(|error| ddil_models::Error::Torch {
        op: "backward",
        message: error.to_string(),
    })?;
    let of_parameters = parameters.learned().into_iter();
    let gradients = of_parameters.map(|(name, tensor)| (name, tensor.grad().copy()));
    let own = [("output".to_owned(), output.detach()), ("sample".to_owned(), sample.grad())];
    Ok(own.into_iter().chain(gradients).collect())
}

/// The same output to the bit, and gradients up to the order of sums: where a map has three readers or more, libtorch
/// adds contributions from inside a block first.
///
/// In `Float` each gradient agrees to 1e-5, and to 1e-6 of the largest: some are only rounding error, such as that of a
/// key's bias, which does not affect softmax. bfloat16 rounds those sums to 8 bits, so there all gradients are compared
/// together.
fn ensure_same(found: &Gradients, expected: &Gradients, autocast: Option<Kind>, what: &str) {
    assert_eq!(found.len(), expected.len());
    assert!(found[0].1.equal(&expected[0].1), "{what}: another output");
    let norm = |tensor: &Tensor| tensor.norm().double_value(&[]);
    let gradients = found.iter().zip(expected).skip(1);
    let defined: Vec<_> = gradients
        .inspect(|((name, a), (_, b))| assert!(a.defined() == b.defined(), "{what}: {name}"))
        .filter(|((_, gradient), _)| gradient.defined())
        .map(|((name, found), (_, expected))| (name, norm(&(found - expected)), norm(expected)))
        .collect();
    let largest = defined.iter().map(|(_, _, norm)| *norm).fold(0.0, f64::max);
    for (name, difference, norm) in &defined {
        let tolerance = 1e-5 * norm + 1e-6 * largest;
        assert!(autocast.is_some() || *difference <= tolerance, "{what}: {name}: {difference:.1e}");
    }
    let square = |(differences, norms), (_, difference, norm): &(_, f64, f64)| {
        (differences + difference.powi(2), norms + norm.powi(2))
    };
    let (differences, norms) = defined.iter().fold((0.0_f64, 0.0_f64), square);
    let error = (differences / norms).sqrt();
    println!("{what}: {error:.1e}");
    assert!(error <= 1e-2, "{what}: {error}");
}

#[test]
fn outputs_and_gradients_are_those_of_the_plain_pass() -> TestResult {
    for name in GOLDEN.into_iter().chain(CONDITION_GOLDEN) {
        let recorded = expected(name)?;
        for (channels_last, autocast) in [(false, None), (true, None), (true, Some(Kind::BFloat16))]
        {
            let model = load(name, channels_last)?;
            let run = || one_pass(&model, model.parameters(), &recorded, autocast, || Ok(()));
            let expected = run()?;
            model.set_activation_checkpointing(true)?;
            let what = format!("{name}, {channels_last}, {autocast:?}");
            ensure_same(&run()?, &expected, autocast, &what);
        }
    }
    Ok(())
}

fn pixels(channels: Vec<u32>, dropout: f64) -> UNet2DConfig {
    UNet2DConfig {
        in_channels: 4,
        out_channels: 4,
        down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
        up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
        block_out_channels: channels,
        layers_per_block: 2,
        norm_num_groups: 4,
        dropout,
        ..UNet2DConfig::default()
    }
}

fn waves(shape: &[i64]) -> Recorded {
    let n: i64 = shape.iter().product();
    let sample = Tensor::arange(n, kind::FLOAT_CPU).sin().view(shape);
    let timesteps = Tensor::arange_start_step(3, 3 + 7 * shape[0], 7, kind::INT64_CPU);
    Recorded::from([("sample".into(), sample), ("timesteps".into(), timesteps)])
}

#[test]
fn dropout_drops_the_same_values_again() -> TestResult {
    let unet = pixels(vec![8, 16], 0.5).build(Placement::default(), 0)?;
    let (model, recorded) = (Model::UNet2D(unet), waves(&[2, 4, 8, 8]));
    model.set_training(true)?;
    let run = || one_pass(&model, model.parameters(), &recorded, None, || Ok(()));
    let plain = run()?;
    model.set_activation_checkpointing(true)?;
    ensure_same(&run()?, &plain, None, "dropout");
    model.set_training(false)?;
    assert_ne!(run()?[0].1, plain[0].1);
    Ok(())
}

/// The backward pass evaluates the student although the teacher was evaluated last.
#[test]
fn an_adapter_gets_the_gradients_of_the_pass_it_took_part_in() -> TestResult {
    for autocast in [None, Some(Kind::BFloat16)] {
        let model = load("unet_condition_sd15", false)?;
        let recorded = expected("unet_condition_sd15")?;
        let config = LoraConfig { rank: 2, alpha: 3.0, ..LoraConfig::default() };
        let lora = Lora::attach(model.parameters(), &config, 0)?;
        for (_, mut tensor) in lora.parameters().learned() {
            // B starts at 0, which would leave A without a gradient.
            let _ = tch::no_grad(|| tensor.f_add_scalar_(0.1))?;
        }
        let other = lora.duplicate()?;
        let evaluate_teacher = || {
            lora.set_enabled(false)?;
            let _no_grad = tch::no_grad_guard();
            model
                .forward(&recorded["sample"], &recorded["timesteps"], &conditioning(&recorded))
                .map(drop)
        };
        let run = || {
            lora.set_enabled(true)?;
            one_pass(&model, lora.parameters(), &recorded, autocast, evaluate_teacher)
        };
        let plain = run()?;
        model.set_activation_checkpointing(true)?;
        ensure_same(&run()?, &plain, autocast, "adapter");
        assert!(!lora.is_enabled(), "the backward pass leaves the switch as it was");
        assert!(plain.iter().skip(2).all(|(_, grad)| grad.abs().max().double_value(&[]) > 0.0));
        assert!(other.parameters().learned().iter().all(|(_, tensor)| !tensor.grad().defined()));
    }
    Ok(())
}

#[test]
fn adapters_merged_between_the_passes_are_refused() -> TestResult {
    let model = load("unet_condition_sd15", false)?;
    let recorded = expected("unet_condition_sd15")?;
    // Only on layers inside blocks: for others the graph contains the weight itself, and libtorch reports it.
    let config = LoraConfig { rank: 2, targets: vec!["to_q".into()], ..LoraConfig::default() };
    let mut lora = Lora::attach(model.parameters(), &config, 0)?;
    model.set_activation_checkpointing(true)?;
    let output =
        model.forward(&recorded["sample"], &recorded["timesteps"], &conditioning(&recorded))?;
    lora.merge()?;
    let error = output.sum(Kind::Float).f_backward().expect_err("another network").to_string();
    assert!(error.contains("adapters were merged"), "{error}");
    Ok(())
}

#[test]
fn passes_without_gradients_and_frozen_networks_are_unaffected() -> TestResult {
    let model = load("unet_class_labels", false)?;
    let recorded = expected("unet_class_labels")?;
    let evaluate =
        || model.forward(&recorded["sample"], &recorded["timesteps"], &conditioning(&recorded));
    let plain = evaluate()?.detach();
    model.set_activation_checkpointing(true)?;
    assert!(model.activation_checkpointing());
    {
        let _no_grad = tch::no_grad_guard();
        assert_eq!(evaluate()?, plain);
    }
    model.parameters().set_trainable(false);
    let frozen = evaluate()?;
    assert!(frozen == plain && !frozen.requires_grad());
    Ok(())
}

#[test]
fn networks_without_blocks_refuse() -> TestResult {
    let model = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
    model.set_activation_checkpointing(false)?;
    let error = model.set_activation_checkpointing(true).expect_err("no blocks").to_string();
    assert!(error.contains("UNet2DModel or UNet2DConditionModel"), "{error}");
    Ok(())
}

/// A batch of 16 at 32x32 through levels of 32 and 64 channels.
#[cfg(target_os = "linux")]
#[test]
fn a_training_step_takes_half_the_memory() -> TestResult {
    use crate::common::{alone, peak_memory};
    alone("recompute::a_training_step_takes_half_the_memory", || {
        let config = UNet2DConfig { layers_per_block: 4, ..pixels(vec![32, 64], 0.0) };
        let unet = config.build(Placement::default(), 0)?;
        let (model, recorded) = (Model::UNet2D(unet), waves(&[16, 4, 32, 32]));
        let step = |recorded: &Recorded| {
            one_pass(&model, model.parameters(), recorded, None, || Ok(())).map(drop)
        };
        // Once small: what libtorch sets up for good is there.
        step(&waves(&[1, 4, 8, 8]))?;
        let before = peak_memory()?;
        model.set_activation_checkpointing(true)?;
        step(&recorded)?;
        let with = peak_memory()? - before;
        model.set_activation_checkpointing(false)?;
        step(&recorded)?;
        let without = peak_memory()? - before;
        println!("{} MB with checkpointing, {} MB without", with >> 20, without >> 20);
        assert!(2 * with < without, "{with} {without}");
        Ok(())
    })
}

/// Processor time of this process so far, of all threads, in clock ticks.
#[cfg(target_os = "linux")]
fn ticks() -> Result<f64, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let rest: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok(rest[11].parse::<f64>()? + rest[12].parse::<f64>()?)
}

/// Stable Diffusion 1.5's blocks with 64, 128 and 128 channels, eight latents of 32x32.
#[cfg(target_os = "linux")]
fn measure_a_step(autocast: Option<Kind>, channels_last: bool) -> TestResult {
    use crate::common::peak_memory;
    use ddil_models::{
        ConditionDownBlockType as Down, ConditionUpBlockType as Up, PerLevel, UNet2DConditionConfig,
    };
    let crosses = Down::CrossAttnDownBlock2D;
    let config = UNet2DConditionConfig {
        down_block_types: vec![crosses, crosses, Down::DownBlock2D],
        up_block_types: vec![Up::UpBlock2D, Up::CrossAttnUpBlock2D, Up::CrossAttnUpBlock2D],
        block_out_channels: vec![64, 128, 128],
        attention_head_dim: PerLevel::All(8),
        cross_attention_dim: PerLevel::All(768),
        ..UNet2DConditionConfig::sd15()
    };
    let model = ModelConfig::UNet2DCondition(config)
        .build(Placement { channels_last, ..Placement::default() }, 0)?;
    let recorded = |batch: i64, side: i64| {
        let mut recorded = waves(&[batch, 4, side, side]);
        let states = Tensor::randn([batch, 77, 768], kind::FLOAT_CPU);
        recorded.insert("encoder_hidden_states".into(), states);
        recorded
    };
    let step = |recorded: &Recorded, checkpointing: bool| {
        model.set_activation_checkpointing(checkpointing)?;
        one_pass(&model, model.parameters(), recorded, autocast, || Ok(())).map(drop)
    };
    let large = recorded(8, 32);
    step(&recorded(1, 8), false)?;
    let before = peak_memory()?;
    // The smaller one first: the peak is that of the whole process.
    for checkpointing in [true, false] {
        step(&large, checkpointing)?;
        let taken = (peak_memory()? - before) >> 20;
        let fused_norms = channels_last;
        let pass = PassShape { fused_norms, checkpointing, ..pass_shape(autocast) };
        let planned = Activations::of(&model.parameters().shapes(), pass).training() >> 20;
        println!("checkpointing {checkpointing}: {taken} MB, {planned} MB of activations planned");
    }
    let mut times = [0.0; 2];
    for _ in 0..3 {
        for (time, checkpointing) in times.iter_mut().zip([true, false]) {
            let before = ticks()?;
            step(&large, checkpointing)?;
            *time += ticks()? - before;
        }
    }
    println!("processor time: {:.2} of the plain step", times[0] / times[1]);
    Ok(())
}

#[cfg(target_os = "linux")]
fn pass_shape(autocast: Option<Kind>) -> PassShape {
    let bytes = if autocast.is_some() { 2 } else { 4 };
    PassShape {
        batch: 8,
        size: [32, 32],
        tokens: 77,
        computed_bytes: bytes,
        normed_bytes: bytes,
        fused_norms: false,
        checkpointing: false,
    }
}

/// `cargo test --release --workspace --test models -- --ignored --nocapture --exact recompute::measured_in_float32`: the peak
/// is that of a process.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "a measurement"]
fn measured_in_float32() -> TestResult {
    measure_a_step(None, false)
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "a measurement"]
fn measured_in_float32_channels_last() -> TestResult {
    measure_a_step(None, true)
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "a measurement"]
fn measured_in_bfloat16() -> TestResult {
    measure_a_step(Some(Kind::BFloat16), false)
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "a measurement"]
fn measured_in_bfloat16_channels_last() -> TestResult {
    measure_a_step(Some(Kind::BFloat16), true)
}
