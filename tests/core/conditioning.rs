use ddil_core::{Conditioning, Error};
use tch::{Tensor, kind};

fn rows(n: i64) -> Tensor {
    Tensor::arange(n, kind::FLOAT_CPU)
}

fn names(conditioning: &Conditioning) -> Vec<&str> {
    conditioning.parts().map(|(name, _)| name).collect()
}

/// The order of parts in saved buffers.
#[test]
fn parts_have_one_order() {
    let forwards = Conditioning::STANDARD.into_iter().chain(["audio", "video"]);
    let backwards = ["video", "audio"].into_iter().chain(Conditioning::STANDARD.into_iter().rev());
    let expected: Vec<&str> = forwards.clone().collect();
    assert_eq!(names(&forwards.map(|name| (name, rows(2))).collect()), expected);
    assert_eq!(names(&backwards.map(|name| (name, rows(2))).collect()), expected);
    let standard =
        ["class_labels", "encoder_hidden_states", "text_embeds", "time_ids", "guidance_weight"];
    assert_eq!(Conditioning::STANDARD, standard);
}

#[test]
fn parts_of_any_name_go_where_the_others_go() -> ddil_core::Result<()> {
    let one = Conditioning::class_labels(rows(2)).with("audio", rows(2));
    let joined = Conditioning::cat(&[&one, &one])?;
    assert_eq!(joined.get("audio").map(Tensor::size), Some(vec![4]));
    let picked = joined.index_select(&Tensor::from_slice(&[3_i64]))?;
    assert_eq!(picked.get("audio"), Some(&Tensor::from_slice(&[1_f32])));
    assert_eq!(names(&picked.without("class_labels")), ["audio"]);
    // A part that was there is replaced.
    assert_eq!(one.with("audio", rows(3)).get("audio").map(Tensor::size), Some(vec![3]));

    let other = Conditioning::class_labels(rows(2)).with("video", rows(2));
    let first = Conditioning::class_labels(rows(2)).with("audio", rows(2));
    let refused = Conditioning::cat(&[&first, &other]);
    assert!(matches!(refused, Err(Error::Conditioning { field, .. }) if field == "parts"));
    Ok(())
}

#[test]
fn unknown_parts_are_refused_by_name() {
    let conditioning = Conditioning::class_labels(rows(2)).with("class_lables", rows(2));
    let known = [Conditioning::CLASS_LABELS];
    let refused = conditioning.ensure_known("predict", "a UNet", &known);
    let expected = "predict: conditioning `class_lables` is not an input of a UNet; its conditioning \
                    inputs: `class_labels`";
    assert_eq!(refused.expect_err("it is misspelt").to_string(), expected);
    assert!(conditioning.without("class_lables").ensure_known("predict", "a UNet", &known).is_ok());
    let refused = Conditioning::class_labels(rows(2)).ensure_known("predict", "a UNet", &[]);
    assert!(refused.expect_err("it takes none").to_string().ends_with("inputs: none"));
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let few = Conditioning::none().with("audio", rows(2)).ensure_batch("predict", 3);
    assert!(matches!(few, Err(Error::Conditioning { field, .. }) if field == "audio"));
    let undefined = Conditioning::none().with("audio", Tensor::new()).ensure_batch("predict", 3);
    assert!(matches!(undefined, Err(Error::Conditioning { field, .. }) if field == "audio"));
}
