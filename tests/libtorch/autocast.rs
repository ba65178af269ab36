use ddil_libtorch::{Autocast, Error};
use tch::{Device, Kind, Tensor, kind};

use crate::TestResult;

fn kind_of_product() -> Kind {
    let x = Tensor::ones([4, 4], kind::FLOAT_CPU);
    x.matmul(&x).kind()
}

#[test]
fn guards_nest_and_restore_the_previous_setting() -> TestResult {
    assert_eq!(kind_of_product(), Kind::Float);
    {
        let _outer = Autocast::new(Device::Cpu, Kind::BFloat16)?;
        assert_eq!(kind_of_product(), Kind::BFloat16);
        {
            let _inner = Autocast::new(Device::Cpu, Kind::Half)?;
            assert_eq!(kind_of_product(), Kind::Half);
            let _off = Autocast::disabled(Device::Cpu)?;
            assert_eq!(kind_of_product(), Kind::Float);
        }
        assert_eq!(kind_of_product(), Kind::BFloat16);
    }
    assert_eq!(kind_of_product(), Kind::Float);
    Ok(())
}

#[test]
fn a_panic_restores_it_too() {
    let caught = std::panic::catch_unwind(|| {
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16).expect("the CPU has it");
        panic!("on purpose");
    });
    assert!(caught.is_err());
    assert_eq!(kind_of_product(), Kind::Float);
}

#[test]
fn other_threads_do_not_see_it() -> TestResult {
    let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
    let there = std::thread::spawn(kind_of_product).join().expect("the thread returns");
    assert_eq!((there, kind_of_product()), (Kind::Float, Kind::BFloat16));
    Ok(())
}

/// A copy kept past the guard would hide that the weight has changed.
#[test]
fn converted_weights_are_not_kept() -> TestResult {
    let weight = Tensor::ones([2, 2], kind::FLOAT_CPU).set_requires_grad(true);
    let x = Tensor::ones([2, 2], kind::FLOAT_CPU);
    let product = || -> ddil_libtorch::Result<f64> {
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
        Ok(x.matmul(&weight).double_value(&[0, 0]))
    };
    assert_eq!(product()?, 2.0);
    {
        let _no_grad = tch::no_grad_guard();
        let _ = weight.shallow_clone().fill_(3.0);
    }
    assert_eq!(product()?, 6.0);
    Ok(())
}

#[test]
fn gradients_come_back_in_full_precision() -> TestResult {
    let weight = Tensor::ones([2, 2], kind::FLOAT_CPU).set_requires_grad(true);
    let loss = {
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16)?;
        weight.matmul(&weight).sum(Kind::Float)
    };
    loss.backward();
    assert_eq!((weight.grad().kind(), weight.grad().double_value(&[0, 0])), (Kind::Float, 4.0));
    Ok(())
}

#[test]
fn unsupported_autocast_is_refused() {
    let float = Autocast::new(Device::Cpu, Kind::Float);
    assert!(matches!(float, Err(Error::UnsupportedKind { kind: Kind::Float, .. })));
    let vulkan = Autocast::new(Device::Vulkan, Kind::Half);
    assert!(matches!(vulkan, Err(Error::UnsupportedDevice { device: Device::Vulkan, .. })));
    if !ddil_libtorch::cuda_built() {
        assert!(matches!(Autocast::new(Device::Cuda(0), Kind::Half), Err(Error::Torch { .. })));
    }
}
