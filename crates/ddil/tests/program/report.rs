//! `ddil report`, `ddil runs` and the figures of `ddil inspect`: the values of the files, safely, also of a run that goes
//! on. Where there is Chromium, pages are opened in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{
    Ended, TestResult, Workshop, arguments, copy_folder, json, num_lines, status,
};
use crate::text_teacher::Family;

/// A comparison of two arms with two seeds, in seconds.
const MATRIX: &str = r#"name = "tiny"
base = "distill.toml"
seeds = [0, 1]

[set]
"student.updates_per_stage" = 3
"data.batch_size" = 7
"teacher.guidance" = { kind = "baked_in" }

[[axes]]
name = "priors"
baseline = "forward"
values = [
    { name = "forward", set = { "mixing.priors" = { kind = "constant", priors = { forward = 1.0 } } } },
    { name = "mixed+more" },
]

[evaluate]
samples = 20
steps = [2]
shift_samples = 6
teacher_steps = 4
extractor = "raw_pixels"
"#;

/// A workshop with a completed distillation that drew several grids.
fn with_run() -> (Workshop, PathBuf) {
    let workshop = Workshop::with_teacher();
    let run = workshop.complete(
        "distill",
        "first",
        &["output.sample_interval=4", "output.log_interval=1"],
    );
    (workshop, run)
}

fn with_comparison() -> (Workshop, PathBuf) {
    let workshop = Workshop::with_teacher();
    fs::write(workshop.path("matrix.toml"), MATRIX).expect("it is writable");
    let ended = workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    assert!(ended.stdout.contains("open runs/tiny/report.html"), "{}", ended.stdout);
    let folder = workshop.run("tiny");
    (workshop, folder)
}

fn page(folder: &Path) -> String {
    read(&folder.join("report.html"))
}

/// A page, with its slashes as they are: the template engine escapes them.
fn read(page: &Path) -> String {
    fs::read_to_string(page).expect("there is a report").replace("&#x2f;", "/")
}

/// The report of a folder, written again.
fn renewed(workshop: &Workshop, folder: &Path) -> String {
    workshop.ddil(&["report", folder.to_str().expect("it is UTF-8")]).succeeded();
    page(folder)
}

/// The exact value of each figure in the tables of last values.
fn figures(page: &str) -> Vec<(String, f64)> {
    let cells = page.split("data-figure=\"").skip(1);
    let cell = |text: &str| {
        let (name, rest) = text.split_once('"').expect("the attribute ends");
        let value = rest.split_once("data-sort=\"").and_then(|(_, rest)| rest.split_once('"'));
        let value = value.expect("it has a value").0.parse().expect("it is a number");
        (name.to_owned(), value)
    };
    cells.map(cell).collect()
}

/// The numbers of a table's cells.
fn numbers_of(page: &str, table: &str) -> Vec<f64> {
    let (_, rest) = page.split_once(&format!("id=\"{table}\"")).expect("there is such a table");
    let (table, _) = rest.split_once("</table>").expect("it ends");
    let values = table.split("data-sort=\"").skip(1).filter_map(|text| text.split('"').next());
    values.filter_map(|value| value.parse().ok()).collect()
}

fn last_line(run: &Path) -> Value {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("the run wrote it");
    serde_json::from_str(text.lines().last().expect("it has lines")).expect("it is JSON")
}

/// Nothing is loaded from anywhere: every address is data, a link for a reader, or a place in the folder.
fn assert_self_contained(page: &str) {
    assert!(page.contains("default-src 'none'"), "the policy is missing");
    for attribute in ["src=\"", "srcset=\"", "action=\"", "poster=\""] {
        for address in page.split(attribute).skip(1) {
            assert!(
                address.starts_with("data:"),
                "{attribute}{}",
                &address[..40.min(address.len())]
            );
        }
    }
    assert!(!page.contains("@import") && !page.contains("url("), "a style loads something");
}

#[test]
fn a_run_ends_with_a_report_of_its_last_figures() -> TestResult {
    let (workshop, run) = with_run();
    let page = page(&run);
    assert_self_contained(&page);
    let line = last_line(&run);
    let line = line.as_object().ok_or("an object")?;
    let shown = figures(&page);
    // Every line contains all figures but those of timesteps, whose last value may be earlier.
    for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
        let found = shown.iter().find(|(shown, _)| shown == name).ok_or(name.as_str())?;
        assert_eq!(Some(found.1), value.as_f64(), "{name}");
    }
    for words in [
        "completed",
        "12 of 12",
        "a student of 4 steps",
        "progressive distillation",
        "settings differ",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert_eq!(page.matches("class=\"frame\"").count(), 3, "grids at 4, 8 and 12");
    assert!(page.contains("checkpoints/step_0000012") && page.contains("id=\"frame\""));
    assert!(page.len() < 2_000_000, "{}", page.len());

    let caption = "Teacher, 10 steps of the usual 50, to bound the time, guidance 2<";
    assert!(page.contains(caption) && page.contains("Samples of the teacher"));

    // Written again, elsewhere, with another grid of the teacher.
    let grid = run.join("samples/step_0000004.png");
    fs::copy(grid, run.join("samples/teacher.png"))?;
    let elsewhere = workshop.path("elsewhere.html");
    let path = run.to_str().ok_or("UTF-8")?;
    let ended = workshop.ddil(&["report", path, "-o", "elsewhere.html"]).succeeded();
    assert_eq!(ended.stdout, "elsewhere.html\n");
    let again = fs::read_to_string(&elsewhere)?;
    assert!(again.contains("Samples of the teacher") && again.contains("<figcaption>Teacher<"));

    let trained = workshop.complete("train", "teacher", &[]);
    assert!(self::page(&trained).contains("Trains a diffusion model on"));
    Ok(())
}

/// The levels of a PNG file.
fn levels(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).expect("the grid was written");
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    let mut levels = vec![0; reader.output_buffer_size().expect("it is small")];
    reader.next_frame(&mut levels).expect("it is complete");
    levels
}

#[test]
fn the_teacher_is_drawn_once_and_changes_nothing() -> TestResult {
    let (workshop, run) = with_run();
    let teacher = run.join("samples/teacher.png");
    // The same as by hand: guidance and thresholding are those of the run.
    let by_hand = "sample teacher --steps 10 --guidance-scale 2 --seed 3 -n 3 --output by-hand.png";
    workshop.ddil(&by_hand.split(' ').collect::<Vec<_>>()).succeeded();
    assert_eq!(levels(&teacher), levels(&workshop.path("by-hand.png")));

    // Metrics, checkpoints, the model and the student's grids are those of a run without it.
    let none = ["output.sample_interval=4", "output.log_interval=1", "output.samples_per_class=0"];
    let without = workshop.complete("distill", "without", &none);
    assert!(!without.join("samples/teacher.png").exists());
    let only_last = workshop.complete("distill", "last", &["output.log_interval=1"]);
    assert!(!only_last.join("samples/teacher.png").exists());
    for other in [&without, &only_last] {
        for file in ["metrics.jsonl", "export/unet/diffusion_pytorch_model.safetensors"] {
            assert_eq!(fs::read(run.join(file))?, fs::read(other.join(file))?, "{file}");
        }
        let last = "samples/step_0000012.png";
        assert_eq!(fs::read(run.join(last))?, fs::read(other.join(last))?);
    }

    // A run that goes on draws it if it is missing, and leaves one that is there.
    for (name, kept) in [("missing", None), ("kept", Some(&b"mine"[..]))] {
        let rewound = workshop.rewound(&run, name, 6);
        let own = rewound.join("samples/teacher.png");
        match kept {
            Some(bytes) => fs::write(&own, bytes)?,
            None => fs::remove_file(&own)?,
        }
        let path = rewound.to_str().ok_or("UTF-8")?;
        workshop.ddil(&["distill", "--resume", path]).succeeded();
        let expected = kept.map_or_else(|| fs::read(&teacher), |bytes| Ok(bytes.to_vec()))?;
        assert!(fs::read(&own)? == expected, "{name}");
    }
    Ok(())
}

#[test]
fn the_teacher_of_several_stages_is_the_first() {
    let workshop = Workshop::with_teacher();
    let stages = ["student.stages=[4, 2]", "output.sample_interval=20"];
    let run = workshop.complete("distill", "stages", &stages);
    let by_hand = "sample teacher --steps 10 --guidance-scale 2 --seed 3 -n 3 --output by-hand.png";
    workshop.ddil(&by_hand.split(' ').collect::<Vec<_>>()).succeeded();
    assert_eq!(levels(&run.join("samples/teacher.png")), levels(&workshop.path("by-hand.png")));
}

#[test]
fn a_text_teacher_is_drawn_for_the_prompts_of_the_grids() {
    let workshop = Workshop::of_text(Family::StableDiffusion);
    let settings = ["output.sample_interval=2", "output.prompts=[\"a red cat\", \"a dog\"]"];
    let run = workshop.complete("distill", "drawn", &settings);
    let (teacher, student) =
        (levels(&run.join("samples/teacher.png")), levels(&run.join("samples/step_0000002.png")));
    assert!(teacher.len() == student.len() && teacher != student);
    assert!(page(&run).contains("guidance 3<"));
}

#[test]
fn a_comparison_ends_with_a_report_of_its_results() -> TestResult {
    let (workshop, folder) = with_comparison();
    let page = page(&folder);
    assert_self_contained(&page);
    let results = json(&folder.join("results.json"));
    let entries = results.as_array().ok_or("an array")?;
    let (table, cells) = (numbers_of(&page, "results"), numbers_of(&page, "cells"));
    for entry in entries {
        let frechet = entry["measurement"]["frechet"].as_f64().ok_or("a number")?;
        match (&entry["kind"], &entry["own_steps"]) {
            (kind, _) if kind != "cell" => assert!(table.contains(&frechet), "{entry}"),
            (_, Value::Bool(true)) => assert!(cells.contains(&frechet), "{entry}"),
            _ => {}
        }
    }
    // The mean over seeds, and the difference to the baseline.
    let of = |arm: &str| -> Vec<f64> {
        let own = entries.iter().filter(|entry| {
            entry["axes"]["priors"] == arm && entry["own_steps"] == true && entry["kind"] == "cell"
        });
        own.filter_map(|entry| entry["measurement"]["frechet"].as_f64()).collect()
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (forward, mixed) = (of("forward"), of("mixed+more"));
    assert_eq!((forward.len(), mixed.len()), (2, 2));
    assert!(table.contains(&mean(&forward)) && table.contains(&mean(&mixed)));
    let difference = mean(&[mixed[0] - forward[0], mixed[1] - forward[1]]);
    assert!(page.contains(&format!("data-difference=\"{difference}\"")), "{difference}");
    // Every cell has its own report, which leads back.
    assert_eq!(page.matches("href=\"cells/").count(), 4);
    assert!(page.contains("href=\"cells/mixed%2Bmore_seed0/report.html\""));
    let cell = self::page(&folder.join("cells/mixed+more_seed0"));
    assert!(cell.contains("href=\"../../report.html\""));
    assert_eq!(page.matches("alt=\"Samples of ").count(), 3, "the teacher and two arms");

    // From elsewhere, links are those of the machine.
    workshop.ddil(&["report", "runs/tiny", "--output", "elsewhere.html"]).succeeded();
    let elsewhere = read(&workshop.path("elsewhere.html"));
    assert!(elsewhere.contains("href=\"file:///") && !elsewhere.contains("href=\"cells/"));
    Ok(())
}

#[test]
fn a_comparison_has_a_report_before_its_end() -> TestResult {
    let (workshop, folder) = with_comparison();
    // As after two of four cells: the results are written at the end.
    for name in ["results.json", "cells/mixed+more_seed1.json", "cells/forward_seed1.json"] {
        fs::remove_file(folder.join(name))?;
    }
    let page = renewed(&workshop, &folder);
    for words in ["2 of 4 cells", "teacher, guidance 1", "Paired differences"] {
        assert!(page.contains(words), "{words}");
    }
    // Without a plan, as an earlier version left it.
    workshop.ddil(&["compare", "matrix.toml"]).succeeded();
    fs::remove_file(folder.join("plan.json"))?;
    let page = renewed(&workshop, &folder);
    assert!(page.contains("An earlier version made this folder") && page.contains("mixed+more"));
    Ok(())
}

#[test]
fn names_and_messages_are_text_and_never_markup() -> TestResult {
    const EVIL: &str = "<script>alert(1)</script>\"'&amp;";
    let (workshop, first) = with_run();
    let run = workshop.run("<img src=x onerror=alert(1)> & \"quotes\"");
    copy_folder(&first, &run);
    let lines = fs::read_to_string(run.join("metrics.jsonl"))?;
    let evil = json!({ "step": 99, "loss": 1.5, EVIL: 2.5, format!("eval_{EVIL}"): 3.5 });
    fs::write(run.join("metrics.jsonl"), format!("{lines}{evil}\n"))?;
    fs::write(run.join("run.log"), format!("2026-11-30T17:25:49Z  WARN ddil::x: {EVIL}\n"))?;
    let status = json!({ "state": "failed", "step": 99, "error": EVIL });
    fs::write(run.join("status.json"), status.to_string())?;
    let config = fs::read_to_string(run.join("config.toml"))?;
    let config = config.replace("path = \"teacher\"", "path = '''</title></script><b>'''");
    fs::write(run.join("config.toml"), config)?;
    let page = renewed(&workshop, &run);
    for markup in ["<script>alert", "<img src=x", "</title></script>", "<b>"] {
        assert!(!page.contains(markup), "{markup}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;"), "the message is shown");
    assert!(page.contains("\\u003cscript\\u003e"), "the chart has its name");
    Ok(())
}

#[test]
fn a_damaged_run_has_a_report_of_what_is_left() -> TestResult {
    let (workshop, first) = with_run();
    let run = workshop.run("damaged");
    copy_folder(&first, &run);
    for name in ["environment.json", "timings.jsonl", "run.log"] {
        fs::remove_file(run.join(name))?;
    }
    fs::remove_dir_all(run.join("samples"))?;
    fs::write(run.join("config.toml"), "[run]\nname = \"x\"\nfrom_the_future = 1\n")?;
    let text = "{\"step\":1,\"loss\":0.5}\nnonsense\n{\"step\":2,\"loss\":null}\n{\"step\":3,\"lo";
    fs::write(run.join("metrics.jsonl"), text)?;
    let page = renewed(&workshop, &run);
    for words in ["from_the_future", "the first is line 2", "1 NaN or infinite"] {
        assert!(page.contains(words), "{words}");
    }
    fs::write(run.join("metrics.jsonl"), "")?;
    assert!(renewed(&workshop, &run).contains("No figures yet"));
    fs::remove_file(run.join("metrics.jsonl"))?;
    assert!(renewed(&workshop, &run).contains("No figures yet"));
    // The process is gone without a word.
    fs::write(run.join("status.json"), "{\"state\":\"running\",\"step\":3,\"error\":null}")?;
    let page = renewed(&workshop, &run);
    assert!(page.contains("id=\"state\">killed") && !page.contains("id=\"reload\""));
    Ok(())
}

#[test]
fn a_file_of_the_user_is_not_replaced() -> TestResult {
    let (workshop, run) = with_run();
    let own = "<!doctype html><p>my notes";
    fs::write(run.join("report.html"), own)?;
    workshop.ddil(&["report", "runs/first"]).refused(&["is not a report of ddil", "--output"]);
    // At its end, a run that is resumed only warns.
    let ended = workshop.ddil(&["distill", "--resume", "runs/first"]).succeeded();
    assert!(ended.stderr.contains("no report of"), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("done:") && !ended.stdout.contains("curves and samples"),
        "{}",
        ended.stdout
    );
    assert_eq!(page(&run), own);
    // Neither is a device or a folder.
    workshop.ddil(&["report", "runs/first", "-o", "/dev/null"]).refused(&["/dev/null"]);
    workshop.ddil(&["report", "runs/first", "-o", "runs"]).refused(&["runs"]);
    Ok(())
}

#[test]
fn other_folders_are_refused() {
    let workshop = Workshop::new();
    workshop.ddil(&["report", "data"]).refused(&["data", "neither a run", "status.json"]);
    workshop.ddil(&["report", "nothing"]).refused(&["nothing", "does not exist"]);
    workshop.ddil(&["report", "train.toml"]).refused(&["train.toml", "neither a run"]);
    workshop.ddil(&["runs", "nothing"]).refused(&["nothing", "is not a folder"]);
}

#[test]
fn a_watched_report_follows_its_run_to_the_end() {
    let workshop = Workshop::with_teacher();
    let settings = ["student.updates_per_stage=100000", "output.log_interval=1"];
    let run = workshop.run("long");
    let mut training = workshop.start(&arguments("distill", "long", &settings));
    assert!(training.wait_until(|| num_lines(&run) > 3));
    let mut watching = workshop.start(&["report", "runs/long", "--watch"]);
    assert!(watching.wait_until(|| run.join("report.html").is_file()));
    let first = page(&run);
    for words in ["id=\"state\">running", "id=\"reload\"", "of 100000"] {
        assert!(first.contains(words), "{words}");
    }
    let updates = |page: &str| numbers_of(page, "latest").len();
    assert!(updates(&first) > 0);
    assert!(watching.wait_until(|| page(&run) != first), "it is renewed");
    assert_eq!(training.signal("INT").code, Some(0));
    let ended = watching.ended().succeeded();
    assert!(ended.stdout.contains("the run has ended"), "{}", ended.stdout);
    let last = page(&run);
    assert_eq!(status(&run)["state"], "interrupted");
    assert!(last.contains("id=\"state\">interrupted") && !last.contains("id=\"reload\""));
    assert!(last.contains("ddil distill --resume runs/long"));
}

/// A killed process changes no file, and its report says so all the same.
#[cfg(unix)]
#[test]
fn a_watched_report_shows_that_its_run_was_killed() {
    let workshop = Workshop::with_teacher();
    let settings = ["student.updates_per_stage=100000", "output.log_interval=1000000"];
    let run = workshop.run("long");
    let mut training = workshop.start(&arguments("distill", "long", &settings));
    assert!(training.wait_until(|| run.join("status.json").is_file()));
    let mut watching = workshop.start(&["report", "runs/long", "--watch"]);
    assert!(watching.wait_until(|| run.join("report.html").is_file()));
    assert!(page(&run).contains("id=\"state\">running"));
    let _ = training.signal("KILL");
    watching.ended().succeeded();
    assert!(page(&run).contains("id=\"state\">killed"));
}

#[test]
fn runs_are_listed_with_their_state() -> TestResult {
    let (workshop, run) = with_run();
    let killed = workshop.run("group/second");
    copy_folder(&run, &killed);
    fs::write(killed.join("status.json"), "{\"state\":\"running\",\"step\":3,\"error\":null}")?;
    let broken = workshop.run("broken");
    fs::create_dir(&broken)?;
    fs::write(broken.join("status.json"), "{")?;
    let listed = workshop.ddil(&["runs"]).succeeded().stdout;
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 5, "{listed}");
    for (line, words) in [
        (2, &["broken", "unreadable"][..]),
        (3, &["first", "completed", "12/12", "loss 0.", "ago", "MB"]),
        (4, &["group/second", "killed", "12/12"]),
    ] {
        assert!(words.iter().all(|word| lines[line].contains(word)), "{words:?}: {listed}");
    }
    let listed: Value =
        serde_json::from_str(&workshop.ddil(&["runs", "--json"]).succeeded().stdout)?;
    let first = &listed[1];
    assert_eq!(first["path"], "runs/first");
    assert_eq!(
        (&first["state"], &first["step"], &first["total"]),
        (&json!("completed"), &json!(12), &json!(12))
    );
    assert_eq!(first["last"]["loss"], last_line(&run)["loss"]);
    assert!(first["bytes"].as_u64().is_some_and(|bytes| bytes > 1000));
    assert_eq!(workshop.ddil(&["runs", "data"]).succeeded().stdout, "no runs in data\n");
    Ok(())
}

#[test]
fn a_run_is_inspected_with_its_course() -> TestResult {
    let (workshop, _run) = with_run();
    let in_locale = |locale: &str| -> Result<String, Box<dyn std::error::Error>> {
        let mut command = workshop.command(&["inspect", "runs/first"]);
        let command = command.env_remove("LC_CTYPE").env_remove("LANG").env("LC_ALL", locale);
        Ok(Ended::of(command.output()?).succeeded().stdout)
    };
    let (blocks, ascii) = (in_locale("C.UTF-8")?, in_locale("C")?);
    for text in [&blocks, &ascii] {
        for words in ["figures at update 12", "course", "grad_norm", "clipped_"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
    assert!(blocks.contains('█') && blocks.contains('▁'), "{blocks}");
    let (_, table) = ascii.split_once("figures at").ok_or("a table")?;
    assert!(table.is_ascii() && table.contains('@') && table.contains('_'), "{table}");
    Ok(())
}

/// A Chromium on this machine.
fn browser() -> Option<PathBuf> {
    let own = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let folders = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&folders).collect();
    let known = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    own.into_iter().chain(known).find(|path| path.is_file())
}

/// The document after its scripts ran, and what the browser said on its console.
fn opened(browser: &Path, workshop: &Workshop, page: &Path) -> (String, Vec<String>) {
    let mut command = Command::new(browser);
    command.args(["--headless", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]);
    // Root has no sandbox, and the page is our own.
    command.args(["--no-sandbox", "--enable-logging=stderr", "--v=0", "--window-size=1280,900"]);
    command.arg(format!("--user-data-dir={}", workshop.path("browser").display()));
    command.arg(format!("file://{}", page.display()));
    let ended = Ended::of(command.output().expect("the browser is there"));
    let console = ended.stderr.lines().filter(|line| line.contains(":CONSOLE"));
    (ended.stdout.clone(), console.map(str::to_owned).collect())
}

/// `make report-test` shows its words.
#[test]
fn pages_work_in_a_browser() -> TestResult {
    let Some(browser) = browser() else {
        println!(
            "skipped: no Chromium in PATH or in CHROMIUM, so no page was opened (Debian: apt-get install chromium)"
        );
        return Ok(());
    };
    let (workshop, run) = with_run();
    let (dom, console) = opened(&browser, &workshop, &run.join("report.html"));
    assert!(console.is_empty(), "{console:?}");
    let written = page(&run);
    let num_charts = written.matches("class=\"chart\"").count();
    assert!(num_charts >= 6, "{num_charts}");
    assert_eq!(dom.matches("data-drawn=\"true\"").count(), num_charts);
    assert_eq!(dom.matches("<canvas").count(), num_charts);
    assert_eq!(figures(&dom), figures(&written));
    assert!(dom.contains("data-theme=\"light\"") || dom.contains("data-theme=\"dark\""));

    let (workshop, folder) = with_comparison();
    let (dom, console) = opened(&browser, &workshop, &folder.join("report.html"));
    assert!(console.is_empty(), "{console:?}");
    let written = page(&folder);
    assert_eq!(
        dom.matches("data-drawn=\"true\"").count(),
        written.matches("class=\"chart\"").count()
    );
    for table in ["results", "cells"] {
        assert_eq!(numbers_of(&dom, table), numbers_of(&written, table));
    }
    for entry in json(&folder.join("results.json")).as_array().ok_or("an array")? {
        let frechet = entry["measurement"]["frechet"].as_f64().ok_or("a number")?;
        let is_shown = entry["kind"] != "cell" || entry["own_steps"] == true;
        let shown = [numbers_of(&dom, "results"), numbers_of(&dom, "cells")].concat();
        assert!(!is_shown || shown.contains(&frechet), "{entry}");
    }
    // The libraries make every heading reachable by key.
    assert!(dom.matches("tabindex=\"0\"").count() > written.matches("tabindex=\"0\"").count());
    println!(
        "opened two reports with {}: no word on the console, all charts drawn",
        browser.display()
    );
    Ok(())
}
