//! `NetworkDenoiser`: the output of a network as clean data and noise.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ddil_core::{Conditioning, Denoiser, Discriminator};
use ddil_libtorch::ArgumentError;
use ddil_models::{
    BoxedError, DiscriminatorHeadConfig, Error, MlpConfig, Model, ModelConfig, NetworkConfig,
    NetworkDenoiser, NetworkDiscriminator, OutputObserver, Placement, Precision, SkipConfig,
    UnknownKeys, weights,
};
use ddil_schedulers::{FlowConfig, NoiseScheduleConfig, PredictionType, VpConfig};
use tch::{Kind, Tensor, kind};

use crate::common::{TestResult, golden, relative_error};

const TYPES: [PredictionType; 3] =
    [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];

fn unet() -> ddil_models::Result<Model> {
    Model::from_folder(golden("unet_class_labels"), Placement::default(), UnknownKeys::Refuse)
}

#[test]
fn the_raw_output_is_read_by_prediction_type() -> TestResult {
    let recorded = weights::read_all(golden("unet_class_labels").join("expected.safetensors"))?;
    let (x_t, timesteps) = (&recorded["sample"], &recorded["timesteps"]);
    let conditioning = Conditioning::class_labels(recorded["class_labels"].shallow_clone());
    let schedule = NoiseScheduleConfig::default().build()?;
    let network = Rc::new(unet()?);
    for prediction_type in TYPES {
        let denoiser =
            NetworkDenoiser::new(Rc::clone(&network), prediction_type, schedule.clone())?;
        let found = denoiser.predict(x_t, timesteps, &conditioning)?;
        let expected = prediction_type.convert(&schedule, &recorded["output"], x_t, timesteps)?;
        assert!(relative_error(&found.x0, &expected.x0) < 1e-5);
        assert!(relative_error(&found.epsilon, &expected.epsilon) < 1e-5);
        // A graph leads back to the parameters.
        found.x0.sum(Kind::Float).backward();
    }
    let parameter = network.parameters().get("conv_in.weight").expect("it has one");
    assert!(parameter.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    Ok(())
}

#[test]
fn a_half_precision_network_takes_full_precision_samples() -> TestResult {
    let placement = Placement { kind: Kind::BFloat16, ..Placement::default() };
    let model = ModelConfig::Mlp(MlpConfig::default()).build(placement, 0)?;
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(model, PredictionType::Epsilon, schedule)?;
    let x_t = Tensor::randn([2, 2], kind::FLOAT_CPU);
    let found =
        denoiser.predict(&x_t, &Tensor::from_slice(&[5_i64, 900]), &Conditioning::none())?;
    assert_eq!(found.x0.kind(), Kind::Float);
    Ok(())
}

#[test]
fn flow_networks_receive_a_thousand_sigma() -> TestResult {
    let model = Model::from_folder(
        golden("unet_unconditional"),
        Placement::default(),
        UnknownKeys::Refuse,
    )?;
    let schedule = NoiseScheduleConfig::Flow(FlowConfig::default()).build()?;
    let x_t = Tensor::randn([2, 1, 8, 8], kind::FLOAT_CPU);
    let t = Tensor::from_slice(&[99_i64, 499]);
    let output =
        model.forward(&x_t, &Tensor::from_slice(&[100.0_f32, 500.0]), &Conditioning::none())?;
    let expected = PredictionType::Flow.convert(&schedule, &output, &x_t, &t)?;
    let denoiser = NetworkDenoiser::new(model, PredictionType::Flow, schedule)?;
    let found = denoiser.predict(&x_t, &t, &Conditioning::none())?;
    assert!(relative_error(&found.x0, &expected.x0) < 1e-5);
    Ok(())
}

#[test]
fn conditioning_that_a_network_lacks_is_refused() -> TestResult {
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(unet()?, PredictionType::Epsilon, schedule)?;
    let (x_t, t) =
        (Tensor::zeros([2, 3, 8, 4], kind::FLOAT_CPU), Tensor::zeros([2], kind::INT64_CPU));
    let error = denoiser.predict(&x_t, &t, &Conditioning::none());
    assert!(matches!(
        error,
        Err(ddil_core::Error::ConditioningMissing { field: "class_labels", .. })
    ));
    let weighted = Conditioning::class_labels(t.shallow_clone())
        .with_guidance_weight(Tensor::ones([2], kind::FLOAT_CPU));
    let error = denoiser.predict(&x_t, &t, &weighted).expect_err("no guidance weight");
    assert!(
        matches!(error, ddil_core::Error::Conditioning { field, .. } if field == "guidance_weight")
    );
    let wrong =
        denoiser.predict(&x_t.narrow(1, 0, 1), &t, &Conditioning::class_labels(t.shallow_clone()));
    assert!(matches!(wrong, Err(ddil_core::Error::Network { .. })));
    Ok(())
}

#[test]
fn a_skip_connection_determines_type_and_schedule() -> TestResult {
    let config = MlpConfig { skip: Some(SkipConfig::default()), ..MlpConfig::default() };
    let model = Rc::new(ModelConfig::Mlp(config).build(Placement::default(), 0)?);
    let new = |output, schedule| NetworkDenoiser::new(Rc::clone(&model), output, schedule);
    let schedule = NoiseScheduleConfig::default().build()?;
    let other =
        NoiseScheduleConfig::Vp(VpConfig { beta_end: 0.02, ..VpConfig::default() }).build()?;
    assert!(new(PredictionType::Sample, schedule.clone()).is_ok());
    let wrong_type = new(PredictionType::Epsilon, schedule);
    assert!(matches!(
        wrong_type,
        Err(Error::Argument(ArgumentError::Value { name: "prediction_type", .. }))
    ));
    let wrong_schedule = new(PredictionType::Sample, other);
    assert!(matches!(
        wrong_schedule,
        Err(Error::Argument(ArgumentError::Value { name: "schedule", .. }))
    ));
    Ok(())
}

#[test]
fn noise_prediction_is_refused_without_signal() -> TestResult {
    let config = VpConfig { rescale_betas_zero_snr: true, ..VpConfig::default() };
    let schedule = NoiseScheduleConfig::Vp(config).build()?;
    let refused = NetworkDenoiser::new(unet()?, PredictionType::Epsilon, schedule);
    assert!(matches!(refused, Err(Error::Scheduler(_))));
    Ok(())
}

#[test]
fn a_unet_with_embedded_guidance_depends_on_the_weight() -> TestResult {
    let folder = golden("unet_guidance");
    let recorded = weights::read_all(folder.join("expected.safetensors"))?;
    let network = Rc::new(Model::from_folder(folder, Placement::default(), UnknownKeys::Refuse)?);
    assert_eq!(network.conditioning_fields(), ["class_labels", "guidance_weight"]);
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(Rc::clone(&network), PredictionType::Sample, schedule)?;
    let (x_t, t) = (&recorded["sample"], &recorded["timesteps"]);
    let labels = Conditioning::class_labels(recorded["class_labels"].shallow_clone());
    let error = denoiser.predict(x_t, t, &labels);
    assert!(matches!(
        error,
        Err(ddil_core::Error::ConditioningMissing { field: "guidance_weight", .. })
    ));
    let conditioning = labels.with_guidance_weight(recorded["guidance_weight"].shallow_clone());
    assert!(
        relative_error(&denoiser.predict(x_t, t, &conditioning)?.x0, &recorded["output"]) < 1e-5
    );
    Ok(())
}

#[test]
fn a_text_conditioned_unet_depends_on_every_part() -> TestResult {
    let folder = golden("unet_condition_sdxl");
    let recorded = weights::read_all(folder.join("expected.safetensors"))?;
    let network = Rc::new(Model::from_folder(folder, Placement::default(), UnknownKeys::Refuse)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(Rc::clone(&network), PredictionType::Sample, schedule)?;
    let (x_t, t) = (&recorded["sample"], &recorded["timesteps"]);
    let fields = network.conditioning_fields();
    assert_eq!(fields, ["encoder_hidden_states", "text_embeds", "time_ids"]);
    let conditioning = |left_out: &str| {
        let parts = fields.iter().filter(|field| **field != left_out);
        let parts = parts.map(|field| ((*field).to_owned(), recorded[*field].shallow_clone()));
        parts.collect::<Conditioning>()
    };
    let found = denoiser.predict(x_t, t, &conditioning(""))?;
    assert!(relative_error(&found.x0, &recorded["output"]) < 1e-5);
    for missing in &fields {
        let error =
            denoiser.predict(x_t, t, &conditioning(missing)).expect_err("a part is missing");
        let named = matches!(error,
            ddil_core::Error::ConditioningMissing { field, .. } if field == *missing);
        assert!(named, "{missing}: {error}");
    }
    let weighted = conditioning("").with_guidance_weight(Tensor::ones([3], kind::FLOAT_CPU));
    let error = denoiser.predict(x_t, t, &weighted).expect_err("no guidance weight");
    assert!(
        matches!(error, ddil_core::Error::Conditioning { field, .. } if field == "guidance_weight")
    );
    Ok(())
}

#[test]
fn a_half_precision_unet_takes_full_precision_text() -> TestResult {
    let folder = golden("unet_condition_ssd1b");
    let recorded = weights::read_all(folder.join("expected.safetensors"))?;
    let placement = Placement { kind: Kind::BFloat16, ..Placement::default() };
    let network = Rc::new(Model::from_folder(folder, placement, UnknownKeys::Refuse)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let denoiser = NetworkDenoiser::new(Rc::clone(&network), PredictionType::Sample, schedule)?;
    let fields = network.conditioning_fields();
    let parts = fields.iter().map(|field| ((*field).to_owned(), recorded[*field].shallow_clone()));
    let conditioning: Conditioning = parts.collect();
    let found = denoiser.predict(&recorded["sample"], &recorded["timesteps"], &conditioning)?;
    assert_eq!(found.x0.kind(), Kind::Float);
    assert!(relative_error(&found.x0, &recorded["output"]) < 2e-2);
    Ok(())
}

/// Networks of every class refuse a part that they do not take, also one that no network of this crate takes, with one
/// error that names the part, the network and its inputs.
#[test]
fn a_part_of_another_class_of_network_is_refused() -> TestResult {
    let mlp = ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?;
    let [floats, t] = [kind::FLOAT_CPU, kind::INT64_CPU].map(|kind| Tensor::zeros([2], kind));
    let networks = [
        (unet()?, Tensor::zeros([2, 3, 8, 4], kind::FLOAT_CPU), "`class_labels`"),
        (mlp, Tensor::zeros([2, 2], kind::FLOAT_CPU), "none"),
    ];
    for (network, x_t, takes) in networks {
        let parts = network.conditioning_fields();
        let known: Conditioning = parts.iter().map(|part| (*part, t.shallow_clone())).collect();
        assert!(network.forward(&x_t, &t, &known).is_ok());
        for part in ["text_embeds", "frame_rate"] {
            let more = known.shallow_clone().with(part, floats.shallow_clone());
            let refusals = [
                network.forward(&x_t, &t, &more).map(drop),
                network.forward_with_features(&x_t, &t, &more).map(drop),
                network.features(&x_t, &t, &more).map(drop),
            ];
            for refusal in refusals {
                let message = refusal.expect_err(part).to_string();
                for word in [part, network.class_name(), takes] {
                    assert!(message.contains(word), "{message}");
                }
            }
        }
    }
    Ok(())
}

/// Sums its observations, or fails.
#[derive(Debug, Default)]
struct Sums {
    outputs: RefCell<Vec<f64>>,
    fails: Cell<bool>,
}

impl OutputObserver for Sums {
    fn observe(&self, x_t: &Tensor, t: &Tensor, output: &Tensor) -> Result<(), BoxedError> {
        if self.fails.get() {
            return Err("enough".into());
        }
        assert_eq!((x_t.size()[0], t.size()), (output.size()[0], vec![output.size()[0]]));
        self.outputs.borrow_mut().push(output.sum(Kind::Double).double_value(&[]));
        Ok(())
    }
}

#[test]
fn an_observer_sees_every_output_and_can_end_a_pass() -> TestResult {
    let config = ModelConfig::Mlp(MlpConfig::default());
    let schedule = NoiseScheduleConfig::default().build()?;
    let sums = Rc::new(Sums::default());
    let network = config.build(Placement::default(), 0)?;
    let denoiser = NetworkDenoiser::new(network, PredictionType::Epsilon, schedule)?
        .with_observer(Rc::clone(&sums));
    let head = DiscriminatorHeadConfig::for_model(&config)?.build(Placement::default(), 0)?;
    let discriminator = NetworkDiscriminator::new(&denoiser, head)?;
    let x_t = Tensor::randn([4, 2], kind::FLOAT_CPU);
    let (t, none) = (Tensor::from_slice(&[999_i64, 10, 500, 0]), Conditioning::none());

    let output = denoiser.output(&x_t, &t, &none)?;
    denoiser.predict(&x_t, &t, &none)?;
    let logits = discriminator.logits(&x_t, &t, &none)?;
    // Another network.
    denoiser.duplicate(false)?.predict(&x_t, &t, &none)?;
    let expected = [&output, &output, &logits].map(|seen| seen.sum(Kind::Double).double_value(&[]));
    assert_eq!(*sums.outputs.borrow(), expected);

    sums.fails.set(true);
    assert!(matches!(denoiser.output(&x_t, &t, &none), Err(Error::Observer { .. })));
    assert!(denoiser.predict(&x_t, &t, &none).is_err());
    Ok(())
}

/// Autocast rounds products to eight bits; parameters and outputs stay in 32.
#[test]
fn precision_changes_what_products_are_computed_in() -> TestResult {
    let network = Rc::new(ModelConfig::Mlp(MlpConfig::default()).build(Placement::default(), 0)?);
    let schedule = NoiseScheduleConfig::default().build()?;
    let whole = NetworkDenoiser::new(network, PredictionType::Epsilon, schedule)?;
    let rounded = whole.clone().with_precision(Precision::Bfloat16);
    let x_t = Tensor::randn([64, 2], kind::FLOAT_CPU);
    let (t, none) = (Tensor::full([64], 500, kind::INT64_CPU), Conditioning::none());
    let [whole, rounded] = [whole.output(&x_t, &t, &none)?, rounded.output(&x_t, &t, &none)?];
    assert_eq!((whole.kind(), rounded.kind()), (Kind::Float, Kind::Float));
    let error = relative_error(&rounded, &whole);
    assert!(error > 1e-4 && error < 0.1, "{error}");
    Ok(())
}
