//! Where the program writes: over plain files alone, in the format of the name; and inputs that are not what their names
//! promise.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::process::Command;

use crate::numbers::poison;
use crate::support::{TestResult, Workshop, json, num_lines, status, write_pictures};
use crate::text_teacher::Family;

const TEACHER_WEIGHTS: &str = "teacher/unet/diffusion_pytorch_model.safetensors";

fn sampled_to(name: &str) -> [&str; 8] {
    ["sample", "teacher", "-n", "1", "--steps", "1", "--output", name]
}

#[test]
fn the_name_of_an_output_decides_its_format() {
    let workshop = Workshop::with_teacher();
    for name in ["grid.jpg", "grid.webp", "grid", "grid.png.txt"] {
        let refused = workshop.ddil(&sampled_to(name));
        refused.refused(&[name, "does not end in .png or .safetensors"]);
        assert!(!workshop.path(name).exists());
    }
    workshop.ddil(&sampled_to("no/folder.png")).refused(&["no/folder.png", "does not exist"]);
    workshop.ddil(&sampled_to("GRID.PNG")).succeeded();
    let arguments = ["export", "teacher", "unet.bin", "--format", "single-file-unet"];
    workshop.ddil(&arguments).refused(&["unet.bin", ".safetensors"]);
}

#[test]
fn devices_pipes_and_links_stay_what_they_are() -> TestResult {
    let workshop = Workshop::with_teacher();
    let pipe = workshop.path("pipe.png");
    assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
    for name in ["pipe.png", "/dev/null"] {
        workshop.ddil(&sampled_to(name)).refused(&[name, "not a regular file"]);
    }
    assert!(fs::symlink_metadata(&pipe)?.file_type().is_fifo());

    // A link to a file, to nothing yet, and through another link.
    fs::create_dir(workshop.path("below"))?;
    symlink("below/real.png", workshop.path("link.png"))?;
    symlink("link.png", workshop.path("second.png"))?;
    symlink("below/real.safetensors", workshop.path("link.safetensors"))?;
    for name in ["link.png", "second.png", "link.safetensors"] {
        workshop.ddil(&sampled_to(name)).succeeded();
        assert!(fs::symlink_metadata(workshop.path(name))?.is_symlink(), "{name}");
    }
    assert!(fs::symlink_metadata(workshop.path("below/real.png"))?.is_file());
    assert!(fs::symlink_metadata(workshop.path("below/real.safetensors"))?.is_file());
    symlink("circle.png", workshop.path("circle.png"))?;
    workshop.ddil(&sampled_to("circle.png")).refused(&["circle.png", "links"]);
    Ok(())
}

/// The whole command line is pasted, not only its words.
#[test]
fn a_printed_command_can_be_pasted() -> TestResult {
    let workshop = Workshop::new();
    let folder = workshop.path("my runs (1) 'é$x' #2");
    let settings = [format!("run.folder={:?}", folder.display().to_string())];
    let settings = [settings[0].as_str(), "train.updates=100000"];
    let mut running = workshop.start(&crate::support::arguments("train", "t", &settings));
    assert!(running.wait_until(|| num_lines(&folder.join("t")) >= 2));
    let ended = running.signal("INT").succeeded();
    let line = ended.stdout.lines().last().ok_or("a command")?.trim().to_owned();
    let line = line.replacen("ddil", "\"$DDIL\"", 1) + " --dry-run";
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).env("DDIL", env!("CARGO_BIN_EXE_ddil"));
    let output = shell.output()?;
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn nohup_keeps_a_run_going() -> TestResult {
    let workshop = Workshop::new();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ddil")]);
    command.args(crate::support::arguments("train", "t", &["train.updates=60"]));
    let mut child = command.current_dir(workshop.path("")).spawn()?;
    let run = workshop.run("t");
    while num_lines(&run) < 3 && child.try_wait()?.is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let hang_up = format!("kill -HUP {}", child.id());
    let _ = Command::new("sh").args(["-c", &hang_up]).status()?;
    assert!(child.wait()?.success());
    assert_eq!(status(&run)["state"], "completed");
    assert_eq!(status(&run)["step"], 60);
    Ok(())
}

#[test]
fn a_weight_beyond_half_precision_is_named() -> TestResult {
    let workshop = Workshop::with_teacher();
    poison(&workshop.path(TEACHER_WEIGHTS), "conv_in.bias", 1e6)?;
    let refused = workshop.ddil(&["export", "teacher", "half", "--dtype", "float16"]);
    refused.refused(&["conv_in.bias", "1000000", "Half", "bfloat16"]);
    assert!(!workshop.path("half/model_index.json").exists());
    for (name, kind) in [("single", "float32"), ("brain", "bfloat16")] {
        workshop.ddil(&["export", "teacher", name, "--dtype", kind]).succeeded();
    }
    // What is infinite already is not changed by a cast.
    poison(&workshop.path(TEACHER_WEIGHTS), "conv_in.bias", f32::INFINITY)?;
    workshop.ddil(&["export", "teacher", "infinite", "--dtype", "float16"]).succeeded();
    Ok(())
}

#[test]
fn files_that_were_not_downloaded_are_recognised() -> TestResult {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    let page = "<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n";
    let cases = [(pointer, "git lfs pull"), (page, "HTML")];
    for (content, words) in cases {
        for file in [TEACHER_WEIGHTS, "teacher/unet/config.json", "teacher/model_index.json"] {
            let workshop = Workshop::with_teacher();
            fs::write(workshop.path(file), content)?;
            let name = file.rsplit('/').next().unwrap_or_default();
            workshop.ddil(&sampled_to("a.png")).refused(&[name, words]);
        }
    }
    Ok(())
}

#[test]
fn a_part_of_no_use_may_be_absent() -> TestResult {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let index = workshop.path("teacher/model_index.json");
    let mut listed = json(&index);
    listed["safety_checker"] =
        serde_json::json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    listed["feature_extractor"] = serde_json::json!(["transformers", "CLIPImageProcessor"]);
    fs::write(&index, listed.to_string())?;
    for verb in ["import", "export"] {
        let ended = workshop.ddil(&[verb, "teacher", verb]).succeeded();
        assert!(ended.stderr.contains("feature_extractor, safety_checker"), "{}", ended.stderr);
        let written = json(&workshop.path(verb).join("model_index.json"));
        assert_eq!(written["safety_checker"], serde_json::json!([null, null]));
    }
    // One that is there is kept.
    write_pictures(&workshop.path("teacher/feature_extractor"), 1, 8);
    let ended = workshop.ddil(&["import", "teacher", "kept"]).succeeded();
    assert!(!ended.stderr.contains("feature_extractor"), "{}", ended.stderr);
    Ok(())
}
