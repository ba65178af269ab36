use ddil_schedulers::{
    BetaSchedule, EdmConfig, FinalAlphaCumprod, FlowConfig, NoiseScheduleConfig, Scale, VpConfig,
};
use proptest::prelude::*;
use tch::{Kind, Tensor, kind};

use crate::support::{
    BETA_SCHEDULES, assert_close, families, gap, recorded_values, stable_diffusion, timesteps,
    values, vp,
};

/// `alpha_cumprod` of every timestep against 40 decimal digits, to 1e-12 of itself.
#[test]
fn tables_are_the_closed_form() {
    let exact = recorded_values("tables.safetensors", "exact");
    let mut expected = exact.chunks(1000);
    for (beta_schedule, zero_snr) in
        BETA_SCHEDULES.into_iter().flat_map(|b| [(b, false), (b, true)])
    {
        let schedule = vp(beta_schedule, zero_snr, FinalAlphaCumprod::One);
        let table = expected.next().expect("six tables were recorded");
        for (t, expected) in table.iter().enumerate() {
            let found = schedule.alpha_cumprod_at(t as i64).expect("on the grid");
            let within = (found - expected).abs() <= 1e-12 * expected.abs();
            assert!(within, "{beta_schedule:?} {zero_snr} {t}: {found} is not {expected}");
        }
        let last = schedule.scale_at(999).expect("on the grid");
        assert_eq!(last.alpha == 0.0, zero_snr);
    }
}

/// diffusers multiplies betas up in `Float`: most at the ends of the cosine and of the rescaled schedules.
#[test]
fn tables_of_diffusers_are_within_their_own_rounding() {
    let theirs = recorded_values("tables.safetensors", "diffusers");
    let ours = recorded_values("tables.safetensors", "exact");
    for (i, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        assert!((theirs - ours).abs() <= 1e-6, "{i}: {theirs} {ours}");
        assert!((theirs - ours).abs() <= 1e-4 * ours.abs(), "{i}: {theirs} {ours}");
    }
}

#[test]
fn stable_diffusion_ends_where_it_is_known_to() {
    let schedule = stable_diffusion();
    let last = schedule.scale_at(999).expect("on the grid");
    assert_close(&[last.alpha, last.sigma], &[0.068_264_9, 0.997_667_2], 5e-8);
    assert_close(&[1.0 / last.alpha.powi(2)], &[214.588], 5e-4);
}

#[test]
fn the_clean_end_is_clean_or_the_first_timestep() {
    let clean =
        |last| vp(BetaSchedule::ScaledLinear, false, last).scale_at(-1).expect("the clean end");
    assert_eq!(clean(FinalAlphaCumprod::One), Scale::CLEAN);
    assert_close(&[clean(FinalAlphaCumprod::First).alpha.powi(2)], &[0.99915], 1e-15);
    for schedule in families() {
        assert_eq!(schedule.scale_at(-1).expect("the clean end"), Scale::CLEAN);
    }
}

#[test]
fn flow_and_edm_are_their_definitions() {
    let flow = FlowConfig { num_train_timesteps: 10, shift: 3.0 };
    let flow = NoiseScheduleConfig::Flow(flow).build().expect("valid settings");
    let edm = EdmConfig { num_train_timesteps: 10, ..EdmConfig::default() };
    let edm = NoiseScheduleConfig::Edm(edm).build().expect("valid settings");
    for t in 0..10 {
        let u = (t + 1) as f64 / 10.0;
        let sigma = 3.0 * u / (1.0 + 2.0 * u);
        let scale = flow.scale_at(t).expect("on the grid");
        assert_close(&[scale.alpha, scale.sigma], &[1.0 - sigma, sigma], 1e-15);

        let (low, high) = (0.002_f64.powf(1.0 / 7.0), 80_f64.powf(1.0 / 7.0));
        let sigma = (low + t as f64 / 9.0 * (high - low)).powi(7);
        let scale = edm.scale_at(t).expect("on the grid");
        assert_close(&[scale.alpha, scale.sigma / sigma], &[1.0, 1.0], 1e-13);
    }
}

#[test]
fn a_network_receives_the_time_of_its_family() {
    let [vp, _, flow, edm] = families();
    let t = timesteps(&[0, 499, 999]);
    let on_host = |schedule: &ddil_schedulers::NoiseSchedule| {
        values(&schedule.time_inputs_at(&t).expect("on the grid"))
    };
    assert_eq!(on_host(&vp), [0.0, 499.0, 999.0]);
    assert_close(&on_host(&flow), &[1.0, 500.0, 1000.0], 1e-4);
    let ends = on_host(&edm);
    assert_close(&[ends[0], ends[2]], &[0.002_f64.ln() / 4.0, 80_f64.ln() / 4.0], 1e-6);
}

fn any_family() -> impl Strategy<Value = NoiseScheduleConfig> {
    let vp = (2_u32..1200, 0_usize..3, any::<bool>()).prop_map(|(n, beta, zero)| {
        NoiseScheduleConfig::Vp(VpConfig {
            num_train_timesteps: n,
            beta_schedule: BETA_SCHEDULES[beta],
            rescale_betas_zero_snr: zero,
            ..VpConfig::default()
        })
    });
    let flow = (1_u32..1200, 0.2..5.0).prop_map(|(n, shift)| {
        NoiseScheduleConfig::Flow(FlowConfig { num_train_timesteps: n, shift })
    });
    let edm = (2_u32..1200, 1.0..9.0).prop_map(|(n, rho)| {
        NoiseScheduleConfig::Edm(EdmConfig { num_train_timesteps: n, rho, ..EdmConfig::default() })
    });
    prop_oneof![vp, flow, edm]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every timestep is noisier than the one before, and values on a batch equal those on the host.
    #[test]
    fn signal_strictly_falls(config in any_family()) {
        let schedule = config.build().expect("valid settings");
        let all: Vec<i64> = (-1..schedule.num_train_timesteps()).collect();
        let like = Tensor::zeros([all.len() as i64, 1], kind::DOUBLE_CPU);
        let scales = schedule.scales_at(&timesteps(&all), &like).expect("on the grid");
        let host: Vec<Scale> = all.iter().map(|t| schedule.scale_at(*t).expect("on the grid")).collect();
        prop_assert!(host.windows(2).all(|pair| pair[0].root_snr() > pair[1].root_snr()));
        prop_assert_eq!(values(&scales.alpha), host.iter().map(|s| s.alpha).collect::<Vec<_>>());
        prop_assert_eq!(values(&scales.sigma), host.iter().map(|s| s.sigma).collect::<Vec<_>>());
    }

    #[test]
    fn variance_is_preserved_where_promised(beta in 0_usize..3, zero: bool, t in -1_i64..1000) {
        let scale = vp(BETA_SCHEDULES[beta], zero, FinalAlphaCumprod::One).scale_at(t).expect("on the grid");
        prop_assert!((scale.alpha.powi(2) + scale.sigma.powi(2) - 1.0).abs() < 1e-15);
    }
}

#[test]
fn noise_is_added_to_any_rank_in_its_kind() {
    let schedule = stable_diffusion();
    for shape in [vec![2], vec![2, 3], vec![2, 3, 4], vec![2, 1, 2, 2], vec![2, 1, 2, 2, 2]] {
        let x0 = Tensor::randn(shape.as_slice(), kind::FLOAT_CPU);
        let noise = Tensor::randn(shape.as_slice(), kind::FLOAT_CPU);
        let noisy = schedule.add_noise(&x0, &noise, &timesteps(&[499, -1])).expect("they fit");
        assert_eq!(noisy.kind(), Kind::Float);
        let scale = schedule.scale_at(499).expect("on the grid");
        let first = scale.alpha * x0.get(0) + scale.sigma * noise.get(0);
        assert!(gap(&noisy.get(0), &first) < 1e-6);
        assert_eq!(gap(&noisy.get(1), &x0.get(1)), 0.0, "the clean end adds nothing");
    }
}

#[test]
fn mismatches_are_refused_by_name() {
    let schedule = stable_diffusion();
    let x = Tensor::zeros([2, 3], kind::FLOAT_CPU);
    let say = |t: &Tensor| schedule.scales_at(t, &x).expect_err("it does not fit").to_string();
    assert!(say(&timesteps(&[1])).contains("`timesteps` has shape [1]; expected [2]"));
    assert!(say(&Tensor::zeros([2], kind::FLOAT_CPU)).contains("Int64"));
    for t in [1000, 1001, -2] {
        let message = say(&timesteps(&[t, 0]));
        // 1000 is the row of the clean end, and no timestep.
        assert!(message.contains("NoiseSchedule::scales_at"), "{message}");
        assert!(schedule.scale_at(t).is_err());
    }
    let message =
        schedule.add_noise(&x, &x.transpose(0, 1), &timesteps(&[1, 1])).expect_err("a misfit");
    assert!(message.to_string().contains("[2, 3]"));
}

#[test]
fn invalid_settings_are_refused_by_name() {
    let vp = VpConfig::default;
    let refused = [
        (VpConfig { num_train_timesteps: 0, ..vp() }, "num_train_timesteps"),
        (VpConfig { beta_start: 0.0, ..vp() }, "beta_start"),
        (VpConfig { beta_start: 0.5, beta_end: 0.1, ..vp() }, "beta_start"),
        (VpConfig { beta_end: 1.0, ..vp() }, "beta_end"),
        (VpConfig { beta_start: f64::NAN, ..vp() }, "beta_start"),
        (VpConfig { trained_betas: Some(vec![0.1; 3]), ..vp() }, "a list of 3"),
        (
            VpConfig { num_train_timesteps: 2, trained_betas: Some(vec![1.0, 0.1]), ..vp() },
            "1 at index 0",
        ),
        (
            VpConfig { num_train_timesteps: 1, rescale_betas_zero_snr: true, ..vp() },
            "rescale_betas_zero_snr",
        ),
    ];
    for (config, named) in refused {
        let message =
            NoiseScheduleConfig::Vp(config).build().expect_err("it cannot be").to_string();
        assert!(message.contains(named), "{message}");
    }
    let flow = FlowConfig { shift: 0.0, ..FlowConfig::default() };
    assert!(NoiseScheduleConfig::Flow(flow).build().is_err());
    let edm = EdmConfig { sigma_min: 100.0, ..EdmConfig::default() };
    assert!(NoiseScheduleConfig::Edm(edm).build().is_err());
    // The cosine schedule does not look at betas.
    let cosine = VpConfig {
        beta_schedule: BetaSchedule::SquaredcosCapV2,
        beta_start: 0.0,
        beta_end: 0.0,
        ..vp()
    };
    assert!(NoiseScheduleConfig::Vp(cosine).build().is_ok());
}

#[test]
fn betas_can_be_given_one_by_one() {
    let config = VpConfig {
        num_train_timesteps: 3,
        trained_betas: Some(vec![0.1, 0.5, 1.0]),
        ..VpConfig::default()
    };
    let schedule = NoiseScheduleConfig::Vp(config).build().expect("the last may be 1");
    let found = [0, 1, 2].map(|t| schedule.alpha_cumprod_at(t).expect("on the grid"));
    assert_close(&found, &[0.9, 0.45, 0.0], 1e-15);
}

#[test]
fn settings_are_spelt_by_family() {
    let text =
        r#"{"family": "vp", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}"#;
    let config: NoiseScheduleConfig = serde_json::from_str(text).expect("valid settings");
    let expected = VpConfig {
        beta_schedule: BetaSchedule::SquaredcosCapV2,
        num_train_timesteps: 50,
        ..VpConfig::default()
    };
    assert_eq!(config, NoiseScheduleConfig::Vp(expected));
    let written = serde_json::to_string(&config).expect("settings can be written");
    assert_eq!(serde_json::from_str::<NoiseScheduleConfig>(&written).expect("as written"), config);
    assert!(
        serde_json::from_str::<NoiseScheduleConfig>(r#"{"family": "vp", "shift": 2}"#).is_err()
    );
}
