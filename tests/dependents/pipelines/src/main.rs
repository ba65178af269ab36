//! Images of a class from a model folder, with `ddil-pipelines` and no trainer.

use ddil_models::Placement;
use ddil_pipelines::tch::Kind;
use ddil_pipelines::{ClassToImage, Report};

fn main() -> Result<(), Report> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../assets/fashion-mnist-teacher");
    let model = ClassToImage::open(folder, Placement::default())?;

    let images = model.samples(2).class("Sneaker").steps(4).seed(0).images()?;
    let again = model.samples(2).class("Sneaker").steps(4).seed(0).images()?;
    let other = model.samples(2).class("Bag").steps(4).seed(0).images()?;

    println!("{:?} of {:?}", images.size(), model.class_names());
    if images.size() != [2, 1, 32, 32] || images != again {
        return Err("the same seed and class give other images".into());
    }
    // A sneaker covers less of its image than a bag does.
    let covered = |images: &ddil_pipelines::tch::Tensor| {
        images.gt(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[])
    };
    let (sneaker, bag) = (covered(&images), covered(&other));
    println!("bright share of a sneaker {sneaker:.2}, of a bag {bag:.2}");
    if sneaker < bag { Ok(()) } else { Err("the two classes do not differ as expected".into()) }
}
