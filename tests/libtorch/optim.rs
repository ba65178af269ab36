use ddil_libtorch::ArgumentError;
use ddil_libtorch::{AdamW, Error, TensorList, fused_adamw_};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, max_difference, refusal};

/// The equations, one parameter at a time, in doubles.
struct SlowAdamW {
    params: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    step: i32,
}

impl SlowAdamW {
    fn new(params: &[Tensor]) -> Self {
        let zeros = || params.iter().map(|p| p.zeros_like().to_kind(Kind::Double)).collect();
        let params = params.iter().map(|p| p.to_kind(Kind::Double).copy()).collect();
        Self { exp_avgs: zeros(), exp_avg_sqs: zeros(), params, step: 0 }
    }

    fn step(&mut self, grads: &[Tensor], settings: &AdamW) {
        let AdamW { lr, beta1, beta2, weight_decay, eps } = *settings;
        self.step += 1;
        for (i, grad) in grads.iter().enumerate() {
            let grad = grad.to_kind(Kind::Double);
            self.exp_avgs[i] = beta1 * &self.exp_avgs[i] + (1.0 - beta1) * &grad;
            self.exp_avg_sqs[i] = beta2 * &self.exp_avg_sqs[i] + (1.0 - beta2) * grad.square();
            let mean = &self.exp_avgs[i] / (1.0 - beta1.powi(self.step));
            let square = &self.exp_avg_sqs[i] / (1.0 - beta2.powi(self.step));
            let decayed = &self.params[i] * (1.0 - lr * weight_decay);
            self.params[i] = decayed - lr * mean / (square.sqrt() + eps);
        }
    }
}

const SHAPES: [&[i64]; 5] = [&[], &[7], &[3, 5], &[4, 3, 3, 3], &[2, 33, 17]];

/// Parameters and their state, as `fused_adamw_` takes them.
struct State {
    params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
}

impl State {
    fn new(params: &[Tensor]) -> ddil_libtorch::Result<Self> {
        let params = TensorList::new(params)?;
        let (exp_avgs, exp_avg_sqs) = (params.zeros_like()?, params.zeros_like()?);
        let steps = params.steps()?;
        Ok(Self { params, exp_avgs, exp_avg_sqs, steps })
    }

    fn step(&self, grads: &TensorList, settings: &AdamW) -> ddil_libtorch::Result<()> {
        let Self { params, exp_avgs, exp_avg_sqs, steps } = self;
        fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, settings)
    }
}

#[test]
fn forty_steps_follow_the_equations() -> TestResult {
    forty_steps_follow_the_equations_on(Device::Cpu)
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_follows_the_equations() -> TestResult {
    forty_steps_follow_the_equations_on(Device::Cuda(0))
}

fn forty_steps_follow_the_equations_on(device: Device) -> TestResult {
    for (kind, tolerance) in [(Kind::Float, 5e-6), (Kind::Double, 1e-13)] {
        let random = |shape: &&[i64]| Tensor::randn(*shape, (kind, device));
        let params: Vec<_> = SHAPES.iter().map(random).collect();
        let mut slow = SlowAdamW::new(&params);
        let state = State::new(&params)?;
        for step in 0..40 {
            let lr = 1e-2 / f64::from(1 + step);
            let settings = AdamW { lr, beta2: 0.99, weight_decay: 0.1, ..Default::default() };
            let grads: Vec<_> = SHAPES.iter().map(random).collect();
            slow.step(&grads, &settings);
            state.step(&TensorList::new(&grads)?, &settings)?;
        }
        for (fast, slow) in params.iter().zip(&slow.params) {
            let difference = max_difference(fast, slow);
            assert!(difference < tolerance, "{kind:?} {:?}: {difference}", fast.size());
        }
        assert_eq!(state.steps.get(2)?.double_value(&[]), 40.0);
    }
    Ok(())
}

#[test]
fn a_gradient_in_another_storage_order_counts_the_same() -> TestResult {
    let start = Tensor::randn([4, 3, 5, 5], kind::FLOAT_CPU);
    let grad = Tensor::randn([4, 3, 5, 5], kind::FLOAT_CPU);
    let (straight, turned) = (start.copy(), start.copy());
    let settings = AdamW::default();
    State::new(&[straight.shallow_clone()])?.step(&TensorList::new([&grad])?, &settings)?;
    let grad = ddil_libtorch::channels_last(&grad)?;
    State::new(&[turned.shallow_clone()])?.step(&TensorList::new([&grad])?, &settings)?;
    assert!(max_difference(&straight, &turned) < 1e-7);
    assert!(max_difference(&straight, &start) > 1e-4);
    Ok(())
}

#[test]
fn leaves_that_require_a_gradient_are_stepped() -> TestResult {
    let weight = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    weight.sum(Kind::Float).backward();
    let state = State::new(&[weight.shallow_clone()])?;
    state.step(&ddil_libtorch::grads(&state.params)?, &AdamW { lr: 0.1, ..Default::default() })?;
    assert!((weight.double_value(&[0]) - (1.0 - 1e-3 - 0.1)).abs() < 1e-6);
    Ok(())
}

#[test]
fn lists_that_do_not_fit_are_refused_and_nothing_changes() -> TestResult {
    let params = [Tensor::ones([2], kind::FLOAT_CPU), Tensor::ones([3], kind::FLOAT_CPU)];
    let state = State::new(&params)?;
    let first = || Tensor::ones([2], kind::FLOAT_CPU);
    for (second, reason) in [
        (None, "`grads` has 1 tensors; expected 2"),
        (Some(Tensor::ones([4], kind::FLOAT_CPU)), "`grads` [1] has shape [4]; expected [3]"),
        (Some(Tensor::ones([3], kind::DOUBLE_CPU)), "`grads` [1] is Double; expected Float"),
    ] {
        let grads = TensorList::new(std::iter::once(first()).chain(second))?;
        let said = refusal(state.step(&grads, &AdamW::default()));
        assert!(said.contains(reason), "{said}");
    }

    let State { params: list, exp_avgs, exp_avg_sqs, .. } = &state;
    let grads = TensorList::new(&params)?;
    let steps = TensorList::new([0.0_f64; 2].map(Tensor::from))?;
    let step = fused_adamw_(list, &grads, exp_avgs, exp_avg_sqs, &steps, &AdamW::default());
    assert!(refusal(step).contains("`steps` [0] is Double"));

    assert_eq!(state.steps.get(0)?.double_value(&[]), 0.0);
    assert_eq!(params[0].sum(Kind::Float).double_value(&[]), 2.0);
    Ok(())
}

#[test]
fn moments_in_another_storage_order_are_refused() -> TestResult {
    let state = State::new(&[Tensor::ones([2, 3, 4, 4], kind::FLOAT_CPU)])?;
    let turned = TensorList::new([ddil_libtorch::channels_last(&state.exp_avgs.get(0)?)?])?;
    let State { params, exp_avg_sqs, steps, .. } = &state;
    let step = fused_adamw_(params, params, &turned, exp_avg_sqs, steps, &AdamW::default());
    assert!(refusal(step).contains("`exp_avgs` [0] has strides"));
    Ok(())
}

#[test]
fn settings_out_of_range_are_named() -> TestResult {
    let state = State::new(&[Tensor::ones([1], kind::FLOAT_CPU)])?;
    let good = AdamW::default();
    for (settings, wrong) in [
        (AdamW { lr: -1e-3, ..good }, "lr"),
        (AdamW { beta1: 1.0, ..good }, "beta1"),
        (AdamW { beta2: f64::NAN, ..good }, "beta2"),
        (AdamW { weight_decay: f64::INFINITY, ..good }, "weight_decay"),
        (AdamW { eps: -1.0, ..good }, "eps"),
    ] {
        let result = state.step(&state.params, &settings);
        assert!(
            matches!(result, Err(Error::Argument(ArgumentError::Value { name, .. })) if name == wrong)
        );
    }
    Ok(())
}
