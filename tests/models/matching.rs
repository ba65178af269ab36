//! `Parameters::copy_matching`: students that start from a teacher of another form.

use ddil_models::{
    DownBlockType, Matched, MlpConfig, NetworkConfig, Placement, TimeScaleShift, UNet2DConfig,
    UNet2DModel, UpBlockType,
};
use tch::{Kind, Tensor, kind};

use crate::common::{TestResult, relative_error};

fn config(channels: &[u32], layers_per_block: u32) -> UNet2DConfig {
    UNet2DConfig {
        in_channels: 2,
        out_channels: 2,
        down_block_types: vec![DownBlockType::DownBlock2D; channels.len()],
        up_block_types: vec![UpBlockType::AttnUpBlock2D; channels.len()],
        block_out_channels: channels.to_vec(),
        layers_per_block,
        attention_head_dim: Some(4),
        norm_num_groups: 4,
        ..UNet2DConfig::default()
    }
}

fn build(config: &UNet2DConfig, seed: u64) -> ddil_models::Result<UNet2DModel> {
    config.build(Placement::default(), seed)
}

fn get<'a>(unet: &'a UNet2DModel, name: &str) -> &'a Tensor {
    unet.parameters().get(name).unwrap_or_else(|| panic!("{name} is there"))
}

fn names(list: &[(String, usize)]) -> Vec<&str> {
    list.iter().map(|(name, _)| name.as_str()).collect()
}

fn num_values(matched: &Matched) -> usize {
    let lists = [&matched.copied, &matched.sliced, &matched.fresh];
    lists.into_iter().flatten().map(|(_, values)| values).sum()
}

fn output_of(unet: &UNet2DModel, weight: Option<&Tensor>) -> ddil_models::Result<Tensor> {
    let sample = Tensor::arange(64, kind::FLOAT_CPU).view([2, 2, 4, 4]) / 32.0 - 1.0;
    unet.forward(&sample, &Tensor::from_slice(&[3_i64, 900]), None, weight)
}

#[test]
fn the_same_form_is_copied_whole() -> TestResult {
    let config = config(&[8, 16], 1);
    let (teacher, student) = (build(&config, 0)?, build(&config, 1)?);
    assert_ne!(output_of(&student, None)?, output_of(&teacher, None)?);
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert_eq!(output_of(&student, None)?, output_of(&teacher, None)?);
    assert_eq!(matched.copied.len(), student.parameters().named().len());
    assert!(matched.sliced.is_empty() && matched.fresh.is_empty() && matched.unused.is_empty());
    // Values, not handles; and still to be learned.
    let bias = get(&student, "conv_in.bias");
    assert!(bias.requires_grad());
    {
        let _no_grad = tch::no_grad_guard();
        let _ = bias.shallow_clone().fill_(5.0);
    }
    assert_ne!(get(&teacher, "conv_in.bias"), bias);
    Ok(())
}

#[test]
fn a_student_with_a_guidance_embedding_starts_as_its_teacher() -> TestResult {
    let teacher = build(&config(&[8, 16], 1), 0)?;
    let guided = UNet2DConfig { time_cond_proj_dim: Some(256), ..config(&[8, 16], 1) };
    let student = build(&guided, 1)?;
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert_eq!(matched.fresh, [("time_embedding.cond_proj.weight".to_owned(), 8 * 256)]);
    let weight = Tensor::from_slice(&[7.5_f32, 0.5]);
    assert_eq!(output_of(&student, Some(&weight))?, output_of(&teacher, None)?);
    assert_eq!(get(&student, "time_embedding.cond_proj.weight").abs().max().double_value(&[]), 0.0);
    // The error names how to undo it.
    let back = teacher.parameters().copy_matching(student.parameters())?;
    assert_eq!(names(&back.unused), ["time_embedding.cond_proj.weight"]);
    Ok(())
}

#[test]
fn a_narrower_student_copies_part_of_every_tensor() -> TestResult {
    let (teacher, student) = (build(&config(&[16, 32], 1), 0)?, build(&config(&[8, 12], 1), 1)?);
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert_eq!(num_values(&matched), student.parameters().num_values());
    // Nothing is without a match, and only what no channel count enters is of the same shape.
    assert!(matched.fresh.is_empty() && matched.unused.is_empty());
    assert_eq!(names(&matched.copied), ["conv_out.bias"]);
    assert_eq!(output_of(&student, None)?.size(), [2, 2, 4, 4]);

    let conv_in = get(&teacher, "conv_in.weight").narrow(0, 0, 8);
    assert_eq!(*get(&student, "conv_in.weight"), conv_in);

    // From below 32, over the skip 32; in the student 12 and 12. Then 32 and 16, 12 and 8.
    for (layer, below, skip, share) in [(0, 32, 32, [12, 12]), (1, 32, 16, [12, 8])] {
        let name = format!("up_blocks.0.resnets.{layer}.conv1.weight");
        let (wide, narrow) = (get(&teacher, &name).narrow(0, 0, 12), get(&student, &name));
        assert_eq!(wide.size()[1], below + skip);
        let expected = [wide.narrow(1, 0, share[0]), wide.narrow(1, below, share[1])];
        assert_eq!(*narrow, Tensor::cat(&expected, 1), "{name}");
        let name = format!("up_blocks.0.resnets.{layer}.norm1.bias");
        assert_eq!(get(&student, &name).numel() as i64, share[0] + share[1]);
    }
    // Every other frequency, of cosines and of sines.
    let features = get(&teacher, "time_embedding.linear_1.weight").narrow(0, 0, 32);
    let every_other = Tensor::from_slice(&[0_i64, 2, 4, 6, 8, 10, 12, 14]);
    let expected = features.index_select(1, &every_other);
    assert_eq!(*get(&student, "time_embedding.linear_1.weight"), expected);
    Ok(())
}

#[test]
fn scale_and_shift_each_give_their_first() -> TestResult {
    let with = |channels: &[u32]| UNet2DConfig {
        resnet_time_scale_shift: TimeScaleShift::ScaleShift,
        ..config(channels, 1)
    };
    let (teacher, student) = (build(&with(&[16, 16]), 0)?, build(&with(&[8, 8]), 1)?);
    student.parameters().copy_matching(teacher.parameters())?;
    let name = "down_blocks.0.resnets.0.time_emb_proj.bias";
    let bias = get(&teacher, name);
    let expected = Tensor::cat(&[bias.narrow(0, 0, 8), bias.narrow(0, 16, 8)], 0);
    assert_eq!(*get(&student, name), expected);
    Ok(())
}

#[test]
fn of_a_deeper_teacher_the_first_layers_are_kept() -> TestResult {
    let (teacher, student) = (build(&config(&[8, 8], 2), 0)?, build(&config(&[8, 8], 1), 1)?);
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    // With the same channels everywhere nothing needs cutting.
    assert_eq!(matched.copied.len(), student.parameters().named().len());
    for name in ["down_blocks.0.resnets.0.conv1.weight", "up_blocks.1.resnets.1.conv2.bias"] {
        assert_eq!(get(&student, name), get(&teacher, name), "{name}");
    }
    let unused = names(&matched.unused);
    assert!(unused.iter().all(|name| {
        name.contains("down_blocks") && name.contains("resnets.1")
            || name.contains("up_blocks")
                && (name.contains("resnets.2") || name.contains("attentions.2"))
    }));
    let values: usize = matched.unused.iter().map(|(_, values)| values).sum();
    assert_eq!(values, teacher.parameters().num_values() - student.parameters().num_values());
    assert_eq!(output_of(&student, None)?.size(), [2, 2, 4, 4]);
    Ok(())
}

#[test]
fn parameters_beyond_the_teachers_keep_their_initial_values() -> TestResult {
    let (teacher, student) = (build(&config(&[8, 8], 1), 0)?, build(&config(&[8, 16], 1), 1)?);
    let untouched = build(&config(&[8, 16], 1), 1)?;
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert_eq!(num_values(&matched), student.parameters().num_values());
    assert!(names(&matched.copied).contains(&"down_blocks.0.resnets.0.conv1.weight"));
    for name in names(&matched.fresh) {
        assert_eq!(get(&student, name), get(&untouched, name), "{name}");
    }
    assert!(names(&matched.fresh).contains(&"mid_block.resnets.0.conv1.weight"));
    let text = matched.to_string();
    assert!(
        text.starts_with("copied ") && text.contains("fresh ") && text.contains(", ..]"),
        "{text}"
    );
    assert!(!text.contains('\n'));
    Ok(())
}

#[test]
fn fewer_levels_match_by_name() -> TestResult {
    let (teacher, student) = (build(&config(&[8, 8, 8], 1), 0)?, build(&config(&[8, 8], 1), 1)?);
    let matched = student.parameters().copy_matching(teacher.parameters())?;
    assert_eq!(output_of(&student, None)?.size(), [2, 2, 4, 4]);
    assert!(names(&matched.unused).iter().any(|name| name.starts_with("down_blocks.2.")));
    assert!(names(&matched.unused).iter().any(|name| name.starts_with("up_blocks.2.")));
    Ok(())
}

/// Units that nothing listens to can be left out without a trace.
#[test]
fn a_cut_at_silent_units_changes_nothing() -> TestResult {
    let placement = Placement { kind: Kind::Double, ..Placement::default() };
    let classes = MlpConfig { num_class_embeds: Some(3), ..MlpConfig::default() };
    let teacher =
        MlpConfig { hidden_widths: vec![20, 24], ..classes.clone() }.build(placement, 0)?;
    let student = MlpConfig { hidden_widths: vec![12, 16], ..classes }.build(placement, 1)?;
    {
        let _no_grad = tch::no_grad_guard();
        for (name, heard, silent) in [("layers.1.weight", 12, 8), ("layers.2.weight", 16, 8)] {
            let weight = teacher.parameters().get(name).expect("it is there");
            let _ = weight.narrow(1, heard, silent).zero_();
        }
    }
    student.parameters().copy_matching(teacher.parameters())?;
    let (x, t) = (Tensor::randn([3, 2], kind::DOUBLE_CPU), Tensor::from_slice(&[1_i64, 500, 999]));
    let labels = Tensor::from_slice(&[0_i64, 1, 2]);
    let [found, expected] =
        [&student, &teacher].map(|mlp| mlp.forward(&x, &t, Some(&labels), None));
    assert!(relative_error(&found?, &expected?) < 1e-12);
    Ok(())
}

/// As many inputs in total, but of other kinds: those that the other network lacks have no effect at first.
#[test]
fn inputs_of_another_type_are_not_confused() -> TestResult {
    let plain = MlpConfig { class_features: 32, ..MlpConfig::default() };
    let guided = MlpConfig { embed_guidance: true, ..plain.clone() };
    let classes = MlpConfig { num_class_embeds: Some(4), ..plain };
    let [guided, classes] = [guided, classes].map(|config| config.build(Placement::default(), 0));
    let (guided, classes) = (guided?, classes?);
    let matched = guided.parameters().copy_matching(classes.parameters())?;
    assert_eq!(names(&matched.sliced), ["layers.0.weight"]);
    assert_eq!(names(&matched.unused), ["class_embedding.weight"]);

    // With all inputs of the other network and one more, the output is the same for every weight.
    let both = MlpConfig { embed_guidance: true, ..classes.config().clone() };
    let both = both.build(Placement::default(), 1)?;
    both.parameters().copy_matching(classes.parameters())?;
    let (x, t) = (Tensor::randn([3, 2], kind::FLOAT_CPU), Tensor::from_slice(&[1_i64, 500, 999]));
    let (labels, weights) =
        (Tensor::from_slice(&[0_i64, 1, 2]), Tensor::from_slice(&[0_f32, 1.0, 7.5]));
    let found = both.forward(&x, &t, Some(&labels), Some(&weights))?;
    assert!(relative_error(&found, &classes.forward(&x, &t, Some(&labels), None)?) < 1e-6);
    Ok(())
}
