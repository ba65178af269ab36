use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use ddil_libtorch::{Autocast, Error, default_generator_state, recomputed};
use tch::{Device, Kind, TchError, Tensor, kind};

use crate::{TestResult, refusal};

type Output = Result<Tensor, TchError>;

/// Two layers with a nonlinearity and, optionally, dropout between them.
struct Layers {
    first: Tensor,
    second: Tensor,
    dropout: bool,
}

impl Layers {
    fn new(dropout: bool) -> Self {
        Self::on(Device::Cpu, dropout)
    }

    fn on(device: Device, dropout: bool) -> Self {
        let weight = |rows: i64, columns: i64| {
            let waves = Tensor::arange(rows * columns, (Kind::Float, device)).sin();
            waves.view([rows, columns]).set_requires_grad(true)
        };
        Self { first: weight(7, 5), second: weight(3, 7), dropout }
    }

    fn handle(&self) -> Self {
        let [first, second] = [&self.first, &self.second].map(Tensor::shallow_clone);
        Self { first, second, dropout: self.dropout }
    }

    fn forward(&self, inputs: &[Tensor]) -> Output {
        let mut hidden = inputs[0].f_linear(&self.first, None::<Tensor>)?.f_gelu("none")?;
        if self.dropout {
            hidden = hidden.f_dropout(0.5, true)?;
        }
        hidden.f_linear(&self.second, None::<Tensor>)?.f_mul(&inputs[1])
    }

    fn recomputed(&self, inputs: &[Tensor]) -> ddil_libtorch::Result<Tensor> {
        let layers = self.handle();
        recomputed(inputs, move |inputs| layers.forward(inputs))
    }
}

/// A sample with a gradient, and a factor without one.
fn inputs() -> [Tensor; 2] {
    inputs_on(Device::Cpu)
}

fn inputs_on(device: Device) -> [Tensor; 2] {
    let waves = Tensor::arange(20, (Kind::Float, device)).cos().view([4, 5]);
    [waves.set_requires_grad(true), Tensor::ones([4, 3], (Kind::Float, device)) * 0.5]
}

/// Output, gradient of the sample and of both weights, by one way of computing the same.
fn one_pass(
    layers: &Layers,
    autocast: Option<Kind>,
    ask: impl Fn(&Layers, &[Tensor]) -> ddil_libtorch::Result<Tensor>,
) -> ddil_libtorch::Result<[Tensor; 4]> {
    tch::manual_seed(3);
    let device = layers.first.device();
    let (layers, inputs) = (Layers::on(device, layers.dropout), inputs_on(device));
    let output = {
        let _autocast = autocast.map(|kind| Autocast::new(device, kind)).transpose()?;
        ask(&layers, &inputs)?
    };
    // What draws between the passes must not be drawn again, nor lost.
    let _ = Tensor::randn([100], (Kind::Float, device));
    output.to_kind(Kind::Float).square().sum(Kind::Float).backward();
    Ok([output.detach(), inputs[0].grad(), layers.first.grad(), layers.second.grad()])
}

fn plain(layers: &Layers, inputs: &[Tensor]) -> ddil_libtorch::Result<Tensor> {
    layers.forward(inputs).map_err(|error| Error::Torch { op: "plain", message: error.to_string() })
}

/// The tests of dropout use libtorch's own generator, which is one for the process.
static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn gradients_are_those_of_the_plain_pass_to_the_bit() -> TestResult {
    let _alone = GENERATOR.lock();
    for dropout in [false, true] {
        for autocast in [None, Some(Kind::BFloat16)] {
            let layers = Layers::new(dropout);
            let expected = one_pass(&layers, autocast, plain)?;
            let found = one_pass(&layers, autocast, Layers::recomputed)?;
            assert_eq!(found, expected, "dropout {dropout}, autocast {autocast:?}");
        }
    }
    Ok(())
}

#[test]
fn random_numbers_continue_as_if_drawn_at_once() -> TestResult {
    let _alone = GENERATOR.lock();
    let layers = Layers::new(true);
    let state_after = |ask: fn(&Layers, &[Tensor]) -> ddil_libtorch::Result<Tensor>| {
        let _ = one_pass(&layers, None, ask)?;
        default_generator_state(Device::Cpu)
    };
    assert_eq!(state_after(Layers::recomputed)?, state_after(plain)?);
    Ok(())
}

/// The number of calls of a function shows what is kept.
fn counted(calls: &Arc<AtomicUsize>) -> impl Fn(&[Tensor]) -> Output + Send + 'static {
    let calls = Arc::clone(calls);
    move |inputs| {
        calls.fetch_add(1, Ordering::Relaxed);
        inputs[0].f_exp()
    }
}

#[test]
fn it_is_called_again_in_the_backward_pass_and_only_there() -> TestResult {
    let calls = Arc::new(AtomicUsize::new(0));
    let x = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    let y = recomputed([&x], counted(&calls))?;
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    y.sum(Kind::Float).backward();
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    drop(y);
    assert_eq!(Arc::strong_count(&calls), 1, "the graph still holds the function");

    let without = recomputed([&x.detach()], counted(&calls))?;
    assert!(!without.requires_grad());
    let _no_grad = tch::no_grad_guard();
    assert!(!recomputed([&x], counted(&calls))?.requires_grad());
    assert_eq!((calls.load(Ordering::Relaxed), Arc::strong_count(&calls)), (4, 1));
    Ok(())
}

#[test]
fn a_parameter_receives_its_gradient_without_an_input_that_has_one() -> TestResult {
    let layers = Layers::new(false);
    let [x, factor] = inputs();
    let y = layers.recomputed(&[x.detach(), factor])?;
    y.sum(Kind::Float).backward();
    assert!(layers.first.grad().abs().max().double_value(&[]) > 0.0);
    Ok(())
}

/// `run_backward` gives gradients back and adds to none, also inside parts of parts.
#[test]
fn gradients_can_be_requested_one_by_one_and_parts_nest() -> TestResult {
    let layers = Layers::new(false);
    let inputs = inputs();
    let expected = layers.forward(&inputs)?.f_sum(Kind::Float)?;
    let expected =
        Tensor::f_run_backward(&[expected], &[&inputs[0], &layers.second], false, false)?;

    let inner = layers.handle();
    let nested = recomputed(&inputs, move |inputs| {
        let halves = inner.handle();
        let y = recomputed(inputs, move |inputs| halves.forward(inputs));
        y.map_err(|error| TchError::Torch(error.to_string()))
    })?
    .f_sum(Kind::Float)?;
    let found = Tensor::f_run_backward(&[nested], &[&inputs[0], &layers.second], false, false)?;
    assert_eq!(found, expected);
    let untouched = [&inputs[0], &layers.first, &layers.second];
    assert!(untouched.iter().all(|tensor| !tensor.grad().defined()));
    Ok(())
}

#[test]
fn a_retained_graph_can_be_used_twice() -> TestResult {
    let layers = Layers::new(false);
    let inputs = inputs();
    let y = layers.recomputed(&inputs)?.sum(Kind::Float);
    let once = Tensor::f_run_backward(&[&y], &[&layers.first], true, false)?;
    let twice = Tensor::f_run_backward(&[&y], &[&layers.first], false, false)?;
    assert_eq!(once, twice);
    let again = Tensor::f_run_backward(&[&y], &[&layers.first], false, false);
    assert!(again.expect_err("freed").to_string().contains("a second time"));
    Ok(())
}

#[test]
fn changes_between_the_passes_are_detected() -> TestResult {
    for changed in 0..2 {
        let layers = Layers::new(false);
        let inputs = inputs();
        let y = layers.recomputed(&inputs)?.sum(Kind::Float);
        {
            let _no_grad = tch::no_grad_guard();
            let mut tensor = [&layers.second, &inputs[1]][changed].shallow_clone();
            let _ = tensor.f_mul_scalar_(2.0)?;
        }
        let error = y.f_backward().expect_err("it would be the gradient of another network");
        assert!(error.to_string().contains("modified by an inplace operation"), "{error}");
    }
    Ok(())
}

#[test]
fn there_is_no_second_derivative() -> TestResult {
    let x = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    let y = recomputed([&x], |inputs| inputs[0].f_exp())?.sum(Kind::Float);
    let error = Tensor::f_run_backward(&[&y], &[&x], true, true).expect_err("create_graph");
    assert!(error.to_string().contains("do not support second derivatives"), "{error}");
    Ok(())
}

/// Fails from the second call on.
fn failing(panics: bool) -> impl Fn(&[Tensor]) -> Output + Send + 'static {
    let calls = AtomicUsize::new(0);
    move |inputs| {
        if calls.fetch_add(1, Ordering::Relaxed) == 0 {
            return inputs[0].f_exp();
        }
        assert!(!panics, "on purpose");
        inputs[0].f_matmul(&Tensor::ones([3, 3], kind::FLOAT_CPU))
    }
}

#[test]
fn errors_and_panics_come_back_as_errors() -> TestResult {
    let x = Tensor::ones([2], kind::FLOAT_CPU).set_requires_grad(true);
    let said = refusal(recomputed([&x], |inputs| inputs[0].f_view([7])));
    assert_eq!(said, "recomputed: shape '[7]' is invalid for input of size 2");
    let said = refusal(recomputed([&x], |_| panic!("number {}", 7)));
    assert_eq!(said, "recomputed: the function panicked: number 7");

    for (panics, expected) in
        [(true, "the function panicked: on purpose"), (false, "cannot be multiplied")]
    {
        let y = recomputed([&x], failing(panics))?.sum(Kind::Float);
        let error = y.f_backward().expect_err("the second call fails").to_string();
        assert!(error.contains(expected), "{error}");
        // And the thread is as it was.
        assert!((&x * 2.0).matmul(&x).f_backward().is_ok());
    }
    let undefined = recomputed([&Tensor::new()], |inputs| inputs[0].f_exp());
    assert!(matches!(undefined, Err(Error::Torch { op: "TensorList::push", .. })));
    Ok(())
}

/// Autocast as the forward pass had it, though the backward pass is on a thread that never had any.
#[test]
fn a_graph_may_be_sent_to_another_thread() -> TestResult {
    let _alone = GENERATOR.lock();
    let layers = Layers::new(false);
    let expected = one_pass(&layers, Some(Kind::BFloat16), plain)?;
    let inputs = inputs();
    let loss = {
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
        layers.recomputed(&inputs)?.to_kind(Kind::Float).square().sum(Kind::Float)
    };
    let sent = thread::spawn(move || loss.f_backward());
    sent.join().expect("no panic")?;
    assert_eq!([inputs[0].grad(), layers.first.grad(), layers.second.grad()], expected[1..]);

    let threads: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(|| {
                one_pass(&Layers::new(false), Some(Kind::BFloat16), Layers::recomputed)
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().expect("no panic")?, expected);
    }
    Ok(())
}

/// There the backward pass runs on a thread of the device, which has neither the autocast nor the random numbers of this
/// one.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_recomputes_the_same_values() -> TestResult {
    let _alone = GENERATOR.lock();
    for dropout in [false, true] {
        for autocast in [None, Some(Kind::BFloat16), Some(Kind::Half)] {
            let layers = Layers::on(Device::Cuda(0), dropout);
            let expected = one_pass(&layers, autocast, plain)?;
            let found = one_pass(&layers, autocast, Layers::recomputed)?;
            assert_eq!(found, expected, "dropout {dropout}, autocast {autocast:?}");
        }
    }
    Ok(())
}
