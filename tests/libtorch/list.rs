use ddil_libtorch::ArgumentError;
use ddil_libtorch::{Error, TensorList};
use tch::{Device, Kind, Tensor, kind};

use crate::{TestResult, refusal};

#[test]
fn a_list_shares_its_tensors() -> TestResult {
    let mut weight = Tensor::zeros([2, 2], kind::FLOAT_CPU);
    let list = TensorList::new([&weight])?;
    let _ = weight.fill_(3.0);
    assert_eq!(list.get(0)?.double_value(&[1, 1]), 3.0);
    assert_eq!(list.to_vec()?.len(), 1);
    Ok(())
}

#[test]
fn a_list_outlives_the_handles_it_was_made_from() -> TestResult {
    let list = TensorList::new([Tensor::ones([3], kind::FLOAT_CPU)])?;
    assert_eq!(list.get(0)?.sum(Kind::Float).double_value(&[]), 3.0);
    Ok(())
}

#[test]
fn a_list_can_move_to_another_thread() -> TestResult {
    let list = TensorList::new([Tensor::ones([3], kind::FLOAT_CPU)])?;
    let len = std::thread::spawn(move || list.len()).join().expect("the thread returns");
    assert_eq!(len, 1);
    Ok(())
}

#[test]
fn zeros_and_steps_follow_the_tensors() -> TestResult {
    let half = Tensor::ones([2, 3, 4, 5], (Kind::Half, Device::Cpu));
    let half = ddil_libtorch::channels_last(&half)?;
    let list = TensorList::new([&half, &Tensor::ones([1], kind::DOUBLE_CPU)])?;

    let zeros = list.zeros_like()?.get(0)?;
    assert_eq!((zeros.kind(), zeros.stride()), (Kind::Half, half.stride()));
    assert_eq!(zeros.abs().sum(Kind::Float).double_value(&[]), 0.0);

    let step = list.steps()?.get(1)?;
    assert_eq!((step.size(), step.kind(), step.double_value(&[])), (vec![], Kind::Float, 0.0));
    Ok(())
}

#[test]
fn invalid_list_operations_are_refused() -> TestResult {
    assert!(refusal(TensorList::new([Tensor::new()])).contains("index 0 is undefined"));

    let empty = TensorList::new::<Tensor>([])?;
    assert!(empty.is_empty());
    assert!(matches!(
        empty.get(0),
        Err(Error::Argument(ArgumentError::Value { name: "index", .. }))
    ));
    Ok(())
}
