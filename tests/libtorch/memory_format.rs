use ddil_libtorch::{MemoryFormat, channels_last, is_channels_last, to_memory_format};
use tch::{Kind, Tensor, kind};

use crate::{TestResult, refusal};

#[test]
fn the_order_changes_and_the_numbers_do_not() -> TestResult {
    for shape in [&[2, 3, 4, 5][..], &[2, 3, 2, 4, 5]] {
        let images = Tensor::randn(shape, kind::FLOAT_CPU);
        let turned = channels_last(&images)?;
        assert_eq!((turned.stride()[1], turned.size()), (1, images.size()));
        assert!(is_channels_last(&turned) && !is_channels_last(&images));
        assert_eq!(turned, images);

        let back = to_memory_format(&turned, MemoryFormat::Contiguous)?;
        assert_eq!((back.stride(), is_channels_last(&back)), (images.stride(), false));
    }
    Ok(())
}

#[test]
fn in_order_already_means_no_copy() -> TestResult {
    let turned = channels_last(&Tensor::zeros([1, 2, 3, 3], kind::FLOAT_CPU))?;
    assert_eq!(channels_last(&turned)?.data_ptr(), turned.data_ptr());
    Ok(())
}

#[test]
fn gradients_flow_through() -> TestResult {
    let images = Tensor::ones([1, 2, 3, 3], kind::FLOAT_CPU).set_requires_grad(true);
    channels_last(&images)?.square().sum(Kind::Float).backward();
    assert_eq!(images.grad().sum(Kind::Float).double_value(&[]), 36.0);
    Ok(())
}

#[test]
fn tensors_without_channels_are_refused() {
    let vectors = Tensor::zeros([2, 3], kind::FLOAT_CPU);
    assert!(!is_channels_last(&vectors));
    assert!(refusal(channels_last(&vectors)).contains("channels_last"));
}
