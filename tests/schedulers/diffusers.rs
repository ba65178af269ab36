//! Against numbers recorded from diffusers by `tools/record/record_schedulers.py`, over its whole matrix of settings.
//!
//! Three of its rules apply only in compatibility mode ([`Compatibility::Diffusers`]): the stride to the previous
//! timestep, the raw noise estimate with a clipped `x0`, the rounding of its lists. So `kept` is compared with
//! compatibility on, everywhere; `recomputed` (`use_clipped_model_output=True`) with the default rules, wherever the
//! stride ends on the grid's next entry, and with its stride elsewhere.
//!
//! Errors are at most 1e-5 in `Float`, in units of the terms of a value where these are larger than 1: the noise
//! estimate is divided by `alpha`, 4.9e-5 at the end of the cosine schedule. diffusers builds its table of
//! `alpha_cumprod` in `Float`, up to 4e-5 off at that end (`noise_schedule.rs` compares the tables); a step is compared
//! on the table that it was recorded with, so that this does not hide an error of the step. The remaining share of the
//! old noise at `eta` above 0 is a difference of nearly equal numbers where there is little signal left to lose;
//! diffusers computes it in `Float`, so its root is up to 3.5e-4 off, or NaN.

use ddil_schedulers::{
    BetaSchedule, ConsistencyBoundary, Ddim, Estimate, FinalAlphaCumprod, Lcm, NoiseSchedule,
    NoiseScheduleConfig, PredictionType, Result, Sampler, SamplerStep, Thresholding,
    TimestepSpacing, Timesteps, VpConfig,
};
use tch::{Kind, Tensor};

use crate::support::{BETA_SCHEDULES, recorded_values, rows, timesteps, values, vp};

const TYPES: [PredictionType; 3] =
    [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
const SPACINGS: [TimestepSpacing; 3] =
    [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];
const FINAL: [FinalAlphaCumprod; 2] = [FinalAlphaCumprod::One, FinalAlphaCumprod::First];
const ETAS: [f64; 3] = [0.0, 0.5, 1.0];
const STEPS: [u32; 6] = [1, 2, 4, 7, 10, 50];
const SAMPLE: [f64; 4] = [1.0, -0.5, 0.25, 2.0];
const OUTPUT: [f64; 4] = [0.1, 0.9, -0.3, 1.4];
const NOISE: [f64; 4] = [0.3, -0.7, 1.1, -0.2];
const TOLERANCE: f64 = 1e-5;

fn thresholdings() -> [Thresholding; 3] {
    let dynamic = Thresholding::Dynamic { ratio: 0.9, max_value: 3.0 };
    [Thresholding::None, Thresholding::clamp_pixels(), dynamic]
}

fn positions(n: u32) -> [usize; 3] {
    [0, n as usize / 2, n as usize - 1]
}

fn float(batch: i64, values: &[f64]) -> Tensor {
    rows(batch, values).to_kind(Kind::Float)
}

/// The schedules on diffusers' own tables: for each kind of betas without and with zero terminal signal, and for each
/// of these with both final values.
fn schedules() -> Vec<NoiseSchedule> {
    let tables = recorded_values("tables.safetensors", "diffusers");
    let on_table = |table: &[f64], last| {
        let before = std::iter::once(&1.0).chain(table);
        let betas = table.iter().zip(before).map(|(now, before)| 1.0 - now / before).collect();
        let config = VpConfig {
            trained_betas: Some(betas),
            final_alpha_cumprod: last,
            ..VpConfig::default()
        };
        NoiseScheduleConfig::Vp(config).build().expect("the table falls")
    };
    tables.chunks(1000).flat_map(|table| FINAL.map(|last| on_table(table, last))).collect()
}

/// The precision of `Float`: one part in this number.
const ROUNDING: f64 = 1.2e-7;

/// The share of the old noise that remains after a step.
fn kept_noise(schedule: &NoiseSchedule, eta: f64, (t, prev): (i64, i64)) -> f64 {
    let [now, prev] = [t, prev].map(|t| schedule.scale_at(t).expect("on the grid"));
    prev.sigma * (1.0 - eta.powi(2) * (1.0 - now.snr() / prev.snr())).sqrt()
}

/// How large the terms are that make up a step from `t`: what `Float` rounds.
fn size(schedule: &NoiseSchedule, prediction_type: PredictionType, t: i64) -> f64 {
    let scale = schedule.scale_at(t).expect("on the grid");
    let largest = match prediction_type {
        PredictionType::Epsilon => 1.0 / scale.alpha,
        PredictionType::Sample => 1.0 / scale.sigma,
        PredictionType::VPrediction | PredictionType::Flow => 1.0,
    };
    2.0 * largest.max(1.0)
}

#[track_caller]
fn assert_recorded(found: &[f64], recorded: &[f64], tolerance: f64, what: &str) {
    for (found, recorded) in found.iter().zip(recorded) {
        let within = (found - recorded).abs() <= tolerance;
        assert!(within, "{what}: {found} is not the recorded {recorded} to {tolerance}");
    }
}

/// The settings of a run, in the order of the recorded file.
struct Settings<'a> {
    schedule: &'a NoiseSchedule,
    prediction_type: PredictionType,
    spacing: TimestepSpacing,
    thresholding: Thresholding,
    eta: f64,
}

fn matrix(schedules: &[NoiseSchedule]) -> impl Iterator<Item = Settings<'_>> {
    // Axes of the file: table, output, spacing, final alpha, thresholding, eta.
    schedules.chunks(2).flat_map(|both| {
        TYPES.into_iter().flat_map(move |prediction_type| {
            SPACINGS.into_iter().flat_map(move |spacing| {
                both.iter().flat_map(move |schedule| {
                    thresholdings().into_iter().flat_map(move |thresholding| {
                        ETAS.into_iter().map(move |eta| Settings {
                            schedule,
                            prediction_type,
                            spacing,
                            thresholding: thresholding.clone(),
                            eta,
                        })
                    })
                })
            })
        })
    })
}

impl Settings<'_> {
    fn offset(&self) -> u32 {
        u32::from(self.spacing == TimestepSpacing::Leading)
    }

    fn theirs(&self, n: u32) -> Timesteps {
        Timesteps::diffusers(self.spacing, 1000, n, self.offset()).expect("n is in 1..=1000")
    }

    fn ours(&self, n: u32) -> Timesteps {
        Timesteps::spaced(self.spacing, 1000, n, self.offset()).expect("n is in 1..=1000")
    }

    fn sampler(&self) -> Ddim {
        Ddim::with_eta(self.schedule.clone(), self.eta).expect("in 0..=1")
    }

    /// Every recorded step of these settings at once: where each starts and ends by diffusers' rules.
    fn pairs(&self) -> Vec<(i64, i64)> {
        let of_run = |n| {
            let pairs: Vec<_> = self.theirs(n).pairs().collect();
            positions(n).map(|i| pairs[i])
        };
        STEPS.into_iter().flat_map(of_run).collect()
    }

    /// The steps of a batch by the general path: convert, threshold, step.
    fn general(&self, pairs: &[(i64, i64)], keep_epsilon: bool) -> Vec<f64> {
        let batch = pairs.len() as i64;
        let [x_t, output, noise] = [SAMPLE, OUTPUT, NOISE].map(|values| float(batch, &values));
        let (at, prev): (Vec<i64>, Vec<i64>) = pairs.iter().copied().unzip();
        let t = timesteps(&at);
        let raw = self.prediction_type.convert(self.schedule, &output, &x_t, &t).expect("they fit");
        let said = if keep_epsilon {
            raw.thresholded_keeping_epsilon(&self.thresholding)
        } else {
            raw.thresholded(&self.thresholding, self.schedule, &x_t, &t)
        }
        .expect("they fit");
        let step = SamplerStep::new(&said, &at, &prev).with_noise(&noise);
        values(&self.sampler().step(&step).expect("they fit"))
    }

    /// The prediction that the output means at one timestep, thresholded.
    fn estimate(
        &self,
        x_t: &Tensor,
        output: &Tensor,
        t: i64,
        keep_epsilon: bool,
    ) -> Result<Estimate> {
        let output = output.shallow_clone();
        let raw = Estimate::of_output(self.schedule, self.prediction_type, output, t)?;
        if keep_epsilon {
            raw.thresholded_keeping_epsilon(&self.thresholding, x_t)
        } else {
            raw.thresholded(&self.thresholding, x_t)
        }
    }

    /// Fails unless a step from `pair.0` to `pair.1` is the recorded one, or there is no number to compare.
    #[track_caller]
    fn assert_recorded(&self, found: &[f64], recorded: &[f64], pair: (i64, i64)) {
        let kept = kept_noise(self.schedule, self.eta, pair);
        let takes_a_root = self.eta > 0.0;
        let no_signal = self.schedule.scale_at(pair.0).expect("on the grid").alpha == 0.0;
        let undefined = (no_signal && self.prediction_type == PredictionType::Epsilon)
            || (takes_a_root && kept < ROUNDING.sqrt());
        if undefined && recorded[0].is_nan() {
            return;
        }
        let theirs = if takes_a_root { ROUNDING / kept.max(ROUNDING.sqrt()) } else { 0.0 };
        let tolerance = (TOLERANCE + theirs) * size(self.schedule, self.prediction_type, pair.0);
        assert_recorded(found, recorded, tolerance, &self.describe(pair));
    }

    fn describe(&self, (t, prev): (i64, i64)) -> String {
        let Self { prediction_type, spacing, thresholding, eta, .. } = self;
        format!("{prediction_type:?} {spacing:?} {thresholding:?} eta {eta} from {t} to {prev}")
    }
}

/// Calls `check` with settings, the recorded values of all of their steps, and whether the noise estimate was kept.
fn for_all(check: impl Fn(&Settings<'_>, &[f64], bool)) {
    let schedules = schedules();
    for (name, kept) in [("kept", true), ("recomputed", false)] {
        let recorded = recorded_values("ddim.safetensors", name);
        let per_settings = STEPS.len() * 3 * 4;
        let mut blocks = recorded.chunks(per_settings);
        for settings in matrix(&schedules) {
            check(&settings, blocks.next().expect("a block for each settings"), kept);
        }
        assert!(blocks.next().is_none());
    }
}

#[test]
fn ddim_steps_are_the_recorded_ones_by_the_general_path() {
    for_all(|settings, recorded, kept| {
        let pairs = settings.pairs();
        let found = settings.general(&pairs, kept);
        for ((pair, found), recorded) in pairs.iter().zip(found.chunks(4)).zip(recorded.chunks(4)) {
            settings.assert_recorded(found, recorded, *pair);
        }
    });
}

#[test]
fn ddim_steps_of_whole_batches_are_the_recorded_ones() {
    let [x_t, output, noise] = [SAMPLE, OUTPUT, NOISE].map(|values| float(1, &values));
    for_all(|settings, recorded, kept| {
        for (n, recorded) in STEPS.into_iter().zip(recorded.chunks(3 * 4)) {
            let pairs: Vec<_> = settings.theirs(n).pairs().collect();
            for (i, recorded) in positions(n).into_iter().zip(recorded.chunks(4)) {
                let Ok(estimate) = settings.estimate(&x_t, &output, pairs[i].0, kept) else {
                    assert!(recorded.iter().all(|value| value.is_nan()));
                    continue;
                };
                let sampler = settings.sampler();
                let step =
                    sampler.step_at(x_t.shallow_clone(), &estimate, pairs[i].1, Some(&noise));
                settings.assert_recorded(&values(&step.expect("they fit")), recorded, pairs[i]);
            }
        }
    });
}

/// Our own grids and rules give diffusers' numbers wherever its stride ends on the grid's next entry.
#[test]
fn ddim_steps_of_our_own_rules_are_the_recorded_ones_where_diffusers_is_right() {
    let compared = std::cell::Cell::new(0);
    for_all(|settings, recorded, kept| {
        let consistent = settings.thresholding == Thresholding::None;
        if kept && !consistent {
            return;
        }
        let theirs = settings.pairs();
        let ours = STEPS.into_iter().flat_map(|n| {
            let pairs: Vec<_> = settings.ours(n).pairs().collect();
            positions(n).map(|i| pairs[i])
        });
        let ours: Vec<_> = ours.collect();
        let found = settings.general(&ours, false);
        for (i, recorded) in recorded.chunks(4).enumerate() {
            if ours[i] != theirs[i] {
                continue;
            }
            compared.set(compared.get() + 1);
            settings.assert_recorded(&found[4 * i..][..4], recorded, ours[i]);
        }
    });
    assert!(compared.get() > 10_000, "{compared:?}");
}

/// Whole runs on this project's tables, with a stand-in for a network.
#[test]
fn ddim_runs_end_where_the_recorded_ones_do() {
    let recorded = recorded_values("ddim.safetensors", "loops");
    let mut recorded = recorded.chunks(4);
    for (beta, prediction_type) in BETA_SCHEDULES.into_iter().flat_map(|b| TYPES.map(|p| (b, p))) {
        let schedule = vp(beta, false, FinalAlphaCumprod::One);
        for n in [4, 10] {
            let settings = Settings {
                schedule: &schedule,
                prediction_type,
                spacing: TimestepSpacing::Trailing,
                thresholding: Thresholding::clamp_pixels(),
                eta: 0.0,
            };
            let (sampler, mut x) = (settings.sampler(), float(1, &SAMPLE));
            for (t, prev) in settings.ours(n).pairs() {
                let output = 0.5 * &x * (1.0 + t as f64 / 1000.0);
                let estimate = settings.estimate(&x, &output, t, false).expect("it has a meaning");
                x = sampler.step_at(x, &estimate, prev, None).expect("they fit");
            }
            let recorded = recorded.next().expect("18 runs were recorded");
            assert_recorded(
                &values(&x),
                recorded,
                1.0,
                &format!("{beta:?} {prediction_type:?} {n}"),
            );
        }
    }
}

/// Each recorded LCM step: table, output, thresholding, number of steps, which of them.
fn for_all_lcm(check: impl Fn(&Lcm, PredictionType, &Thresholding, &Timesteps, usize, &[f64])) {
    let recorded = recorded_values("lcm.safetensors", "steps");
    let mut recorded = recorded.chunks(4);
    for schedule in schedules().into_iter().step_by(2) {
        let sampler = Lcm::new(schedule);
        for (prediction_type, thresholding) in
            TYPES.into_iter().flat_map(|p| thresholdings().map(|t| (p, t)))
        {
            for n in STEPS {
                let grid = Timesteps::lcm(1000, 50, n).expect("n is in 1..=50");
                for i in positions(n) {
                    let recorded = recorded.next().expect("a step for each settings");
                    check(&sampler, prediction_type, &thresholding, &grid, i, recorded);
                }
            }
        }
    }
    assert!(recorded.next().is_none());
}

#[test]
fn lcm_steps_are_the_recorded_ones() {
    let boundary = ConsistencyBoundary::default();
    let [x_t, output, noise] = [SAMPLE, OUTPUT, NOISE].map(|values| float(1, &values));
    for_all_lcm(|sampler, prediction_type, thresholding, grid, i, recorded| {
        let (schedule, (t, prev)) = (sampler.schedule(), grid.pairs().nth(i).expect("on the grid"));
        let estimate = Estimate::of_output(schedule, prediction_type, output.shallow_clone(), t)
            .and_then(|raw| raw.thresholded(thresholding, &x_t))
            .and_then(|held| held.with_boundary(boundary, &x_t));
        if recorded[0].is_nan() {
            assert!(estimate.is_err());
            return;
        }
        let what = format!("{prediction_type:?} {thresholding:?} {t}");
        let tolerance = TOLERANCE * size(schedule, prediction_type, t);
        let at = timesteps(&[t]);
        let mut said = prediction_type
            .convert(schedule, &output, &x_t, &at)
            .and_then(|raw| raw.thresholded(thresholding, schedule, &x_t, &at))
            .expect("they fit");
        said.x0 = boundary.apply(&said.x0, &x_t, &at).expect("they fit");
        let (t, prev) = ([t], [prev]);
        let step = SamplerStep::new(&said, &t, &prev).with_noise(&noise);
        let general = values(&sampler.step(&step).expect("they fit"));
        assert_recorded(&general, recorded, tolerance, &what);
        let estimate = estimate.expect("it has a meaning");
        let whole = sampler.step_at(x_t.shallow_clone(), &estimate, prev[0], Some(&noise));
        assert_recorded(&values(&whole.expect("they fit")), recorded, tolerance, &what);
    });
}

#[test]
fn the_recorded_inputs_are_the_ones_used_here() {
    for (name, expected) in [("sample", SAMPLE), ("output", OUTPUT), ("noise", NOISE)] {
        let recorded = recorded_values("ddim.safetensors", name);
        assert!(recorded.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-7));
    }
    assert_eq!(BETA_SCHEDULES[0], BetaSchedule::Linear);
}
