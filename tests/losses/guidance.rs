use ddil_core::{Conditioning, Denoiser};
use ddil_losses::TeacherGuidance;
use rand::SeedableRng;
use tch::{Device, Tensor, kind};

use crate::toy::{Echo, schedules, values};

/// The output of a guided echo: its condition is 3, no condition is 1.
fn output_of(guidance: TeacherGuidance, conditioning: &Conditioning) -> ddil_core::Result<f64> {
    let [schedule, ..] = schedules();
    let null = Conditioning::class_labels(Tensor::from_slice(&[1_i64]));
    let teacher = guidance.wrap(Echo(schedule), null).expect("the settings are valid");
    let (x_t, t) = (Tensor::zeros([1, 1], kind::DOUBLE_CPU), Tensor::from_slice(&[499_i64]));
    Ok(values(&teacher.predict(&x_t, &t, conditioning)?.x0)[0])
}

fn three() -> Conditioning {
    Conditioning::class_labels(Tensor::from_slice(&[3_i64]))
}

#[test]
fn each_kind_of_guidance_wraps_the_teacher_differently() {
    let guided = output_of(TeacherGuidance::Cfg { scale: 2.5 }, &three()).expect("it can answer");
    assert!((guided - 6.0).abs() < 1e-12, "1 + 2.5 (3 - 1), not {guided}");
    let plain = output_of(TeacherGuidance::BakedIn, &three()).expect("it can answer");
    assert_eq!(plain, 3.0);
    let conditioning = three().with_guidance_weight(Tensor::from_slice(&[0.5_f32]));
    let by_weight = output_of(TeacherGuidance::CfgRange { min: 0.0, max: 1.0 }, &conditioning);
    // 3 + 0.5 (3 - 1): the network itself does not receive the weight.
    assert_eq!(by_weight.expect("it can answer"), 4.0);
    let embedded = TeacherGuidance::Embedded { min: 0.0, max: 1.0 };
    assert_eq!(output_of(embedded, &conditioning).expect("it can answer"), 3.5);
}

#[test]
fn a_teacher_with_a_guidance_input_is_never_evaluated_without_a_weight() {
    let [min, max] = [0.0, 1.0];
    for guidance in [TeacherGuidance::Embedded { min, max }, TeacherGuidance::CfgRange { min, max }]
    {
        let message = output_of(guidance, &three()).expect_err("no weight was told").to_string();
        assert!(message.contains("guidance_weight"), "{message}");
    }
}

#[test]
fn no_network_is_guided_twice() {
    let [min, max] = [2.0, 14.0];
    let embedded = TeacherGuidance::Embedded { min, max };
    for (guidance, name, of_student) in [
        (TeacherGuidance::Cfg { scale: 3.0 }, "cfg", TeacherGuidance::BakedIn),
        (TeacherGuidance::BakedIn, "baked_in", TeacherGuidance::BakedIn),
        (TeacherGuidance::CfgRange { min, max }, "cfg_range", embedded),
        (embedded, "embedded", embedded),
    ] {
        assert_eq!(guidance.of_student(), of_student);
        assert_eq!(guidance.is_student_input(), of_student == embedded);
        let written = serde_json::to_value(guidance).expect("settings can be written");
        assert_eq!((guidance.as_str(), &written["kind"]), (name, &name.into()));
        let read: TeacherGuidance = serde_json::from_value(written).expect("as written");
        assert_eq!(read, guidance);
    }
}

#[test]
fn weights_are_drawn_evenly_from_the_range_and_from_the_seed() {
    let [min, max] = [2.0, 14.0];
    let drawn = |guidance: TeacherGuidance, seed| {
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let conditioning =
            guidance.condition(three(), 4000, Device::Cpu, &mut rng).expect("there is a CPU");
        assert!(
            conditioning.get(Conditioning::CLASS_LABELS).is_some(),
            "what was said before is still said"
        );
        values(
            conditioning
                .get(Conditioning::GUIDANCE_WEIGHT)
                .expect("there is a weight for each sample"),
        )
    };
    let draw = |seed| drawn(TeacherGuidance::CfgRange { min, max }, seed);
    let weights = draw(7);
    assert!(weights.iter().all(|w| (2.0..=14.0).contains(w)));
    let mean = weights.iter().sum::<f64>() / 4000.0;
    // Three standard errors of the mean of a uniform distribution of width 12.
    assert!((mean - 8.0).abs() < 3.0 * 12.0 / 12_f64.sqrt() / 4000_f64.sqrt(), "{mean}");
    assert_eq!(weights, draw(7));
    assert_ne!(weights, draw(8));
    assert_eq!(weights, drawn(TeacherGuidance::Embedded { min, max }, 7));
    let mut rng = rand::rngs::StdRng::seed_from_u64(0);
    let untold = TeacherGuidance::BakedIn
        .condition(three(), 4000, Device::Cpu, &mut rng)
        .expect("there is a CPU");
    assert!(untold.get(Conditioning::GUIDANCE_WEIGHT).is_none());
}

#[test]
fn settings_are_spelt_by_kind_and_checked() {
    let cfg: TeacherGuidance =
        serde_json::from_str(r#"{"kind": "cfg", "scale": 4.0}"#).expect("valid settings");
    assert_eq!(cfg, TeacherGuidance::Cfg { scale: 4.0 });
    assert!(serde_json::from_str::<TeacherGuidance>(r#"{"kind": "cfg", "scal": 4.0}"#).is_err());
    let impossible = [
        TeacherGuidance::Cfg { scale: f64::NAN },
        TeacherGuidance::Cfg { scale: -1.0 },
        TeacherGuidance::Embedded { min: 5.0, max: 2.0 },
        TeacherGuidance::Embedded { min: 0.0, max: f64::INFINITY },
        TeacherGuidance::CfgRange { min: -1.5, max: 2.0 },
    ];
    for guidance in impossible {
        let message = guidance.ensure().expect_err("it cannot be").to_string();
        assert!(message.contains("guidance."), "{message}");
    }
}
