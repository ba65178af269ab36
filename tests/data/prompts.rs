//! Files of prompts.

use std::fs;
use std::path::Path;

use ddil_data::{Captions, Error, Prompt, read_prompts};
use tempfile::TempDir;

use crate::TestResult;

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> std::path::PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).expect("it is writable");
        path
    }
}

fn pairs(prompts: &[Prompt]) -> Vec<(&str, Option<&str>)> {
    prompts.iter().map(|prompt| (prompt.text.as_str(), prompt.image.as_deref())).collect()
}

/// All prompts, then the first of each image.
fn both(path: &Path) -> [Vec<(String, Option<String>)>; 2] {
    [Captions::All, Captions::First].map(|captions| {
        let prompts = read_prompts(path, captions).expect("it can be read");
        prompts.into_iter().map(|prompt| (prompt.text, prompt.image)).collect()
    })
}

fn prompts(texts: &[(&str, Option<&str>)]) -> Vec<(String, Option<String>)> {
    texts.iter().map(|(text, image)| ((*text).to_owned(), image.map(str::to_owned))).collect()
}

fn refused(path: &Path) -> String {
    let error = read_prompts(path, Captions::All).expect_err("it cannot be read");
    assert!(matches!(error, Error::Prompts { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(&path.display().to_string()), "{message}");
    message
}

#[test]
fn a_text_file_has_one_prompt_per_line() -> TestResult {
    let files = Files::new();
    let path = files.write("prompts.txt", "\u{feff}a cat\r\n\n  a \"red\" dog, sitting \n");
    let expected = [("a cat", None), ("a \"red\" dog, sitting", None)];
    assert_eq!(pairs(&read_prompts(&path, Captions::First)?), expected);
    // Any ending that is not that of another form.
    assert_eq!(
        pairs(&read_prompts(&files.write("prompts", "a cat"), Captions::All)?)[0].0,
        "a cat"
    );
    Ok(())
}

#[test]
fn lines_of_json_have_one_of_three_keys() {
    let files = Files::new();
    let text = "\u{feff}{\"prompt\": \"a cat\", \"seed\": 3}\n\n\
                {\"file_name\": \"b.png\", \"caption\": [\" a dog\", \"the dog\"], \"image_id\": 4}\n\
                {\"image_id\": 5, \"text\": \"a bag\", \"caption\": \"not this\"}\n\
                {\"image_id\": \"5\", \"text\": \"the bag\"}\n";
    let [all, first] = both(&files.write("prompts.JSONL", text));
    let bag = Some("5");
    let expected = [
        ("a cat", None),
        ("a dog", Some("b.png")),
        ("the dog", Some("b.png")),
        ("a bag", bag),
        ("the bag", bag),
    ];
    assert_eq!(all, prompts(&expected));
    assert_eq!(first, prompts(&[expected[0], expected[1], expected[3]]));
}

#[test]
fn a_table_has_one_of_three_columns() {
    let files = Files::new();
    let text = "\u{feff}id,Prompt,FILE_NAME\r\n1,\"a \"\"red\"\" cat,\nsitting\",a.png\r\n2,007,\r\n3,a dog,a.png\r\n";
    let [all, first] = both(&files.write("prompts.csv", text));
    let expected =
        [("a \"red\" cat,\nsitting", Some("a.png")), ("007", None), ("a dog", Some("a.png"))];
    assert_eq!(all, prompts(&expected));
    assert_eq!(first, prompts(&expected[..2]));
    let [all, _] = both(&files.write("prompts.tsv", "Category\tPrompt\nAnimals\ta cat, a dog\n"));
    assert_eq!(all, prompts(&[("a cat, a dog", None)]));
}

const COCO: &str = r#"{
    "info": {"year": 2017}, "licenses": [],
    "images": [{"license": 4, "file_name": "000007.jpg", "height": 4, "width": 4, "id": 7},
               {"id": 3, "file_name": "000003.jpg"}, {"id": 9}],
    "annotations": [{"image_id": 3, "id": 1, "caption": "A cat. \n"}, {"image_id": 7, "id": 2, "caption": "A dog."},
                    {"image_id": 9, "id": 3, "caption": "A bag."}, {"image_id": 7, "id": 4, "caption": "The dog."},
                    {"image_id": 3, "id": 5, "caption": "The cat."}]
}"#;

#[test]
fn captions_of_coco_are_in_the_order_of_its_images() {
    let [all, first] = both(&Files::new().write("captions_val2017.json", COCO));
    let (seven, three) = (Some("000007.jpg"), Some("000003.jpg"));
    let expected = [
        ("A dog.", seven),
        ("The dog.", seven),
        ("A cat.", three),
        ("The cat.", three),
        ("A bag.", Some("9")),
    ];
    assert_eq!(all, prompts(&expected));
    assert_eq!(first, prompts(&[expected[0], expected[2], expected[4]]));
}

#[test]
fn other_files_of_coco_are_refused_by_their_kind() {
    let files = Files::new();
    let images = r#""images": [{"id": 7}]"#;
    for (name, annotations, words) in [
        (
            "instances_val2017.json",
            r#"[{"image_id": 7, "bbox": [0, 0, 1, 1], "category_id": 1}]"#,
            "object instances",
        ),
        (
            "person_keypoints_val2017.json",
            r#"[{"image_id": 7, "keypoints": [1], "bbox": [0]}]"#,
            "keypoints of persons",
        ),
        ("panoptic_val2017.json", r#"[{"image_id": 7, "segments_info": []}]"#, "panoptic"),
        ("other.json", r#"[{"image_id": 7, "id": 3}]"#, "no captions"),
    ] {
        let path = files.write(name, format!("{{{images}, \"annotations\": {annotations}}}"));
        let message = refused(&path);
        assert!(message.contains(words) && message.contains("captions_*.json"), "{message}");
    }
    for (text, words) in [
        (format!("{{{images}}}"), "no `annotations`"),
        (r#"{"annotations": []}"#.to_owned(), "no `images`"),
        (r#"["a cat", "a dog"]"#.to_owned(), "ending .jsonl"),
        ("{".to_owned(), "line 1"),
        (r#"{"images": [], "annotations": []}"#.to_owned(), "no prompts"),
        (r#"{"images": [{"id": 1.5}], "annotations": []}"#.to_owned(), "whole number"),
    ] {
        let message = refused(&files.write("captions.json", text));
        assert!(message.contains(words), "{words}: {message}");
    }
}

#[test]
fn every_fault_of_a_file_has_its_place() {
    let files = Files::new();
    let coco = r#"{"images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8}, {"id": 8}],
        "annotations": [{"image_id": 5, "caption": "A"}, {"image_id": 8, "caption": " "}, {"image_id": 8}]}"#;
    let json = "{\"text\": \"a\"}\n{\"text\": \" \"}\n{\"txt\": \"a\"}\nnot json\n{\"text\": null}\n{\"text\": 3}\n\
                {\"text\": []}\n{\"text\": [\"a\", \"\"]}\n";
    for (name, text, places) in [
        (
            "a.json",
            coco,
            &[
                "annotations[0]: its image 5 is not among the 3 of `images`",
                "annotations[1]: no caption of the image 8",
                "annotations[2]: no caption",
                "the image 7.jpg has no caption",
                "the image 8 is listed twice",
            ][..],
        ),
        (
            "a.jsonl",
            json,
            &[
                "line 2: the prompt is empty",
                "line 3: no key `text`, `prompt`, `caption`",
                "line 4: ",
                "line 5: no key",
                "line 6: ",
                "line 7: the prompt is empty",
                "line 8: the prompt is empty",
            ],
        ),
        ("a.csv", "prompt,n\na,1\n\" \",2\nb\n", &["line 3: the prompt is empty", "line 4: "]),
        (
            "b.csv",
            "a cat, sitting\na dog\n",
            &["no column `text`, `prompt`, `caption`", "a cat,  sitting"],
        ),
        ("c.csv", "prompt\n", &["no prompts"]),
        ("d.csv", "", &["no column"]),
        ("a.txt", " \n\n", &["no prompts"]),
        ("b.jsonl", "\n", &["no prompts"]),
    ] {
        let message = refused(&files.write(name, text));
        for words in places {
            assert!(message.contains(words), "{name}, {words}: {message}");
        }
    }
    for name in ["a.txt", "a.json", "a.jsonl", "a.csv"] {
        let error = read_prompts(&files.write(name, b"caf\xe9"), Captions::All);
        assert!(matches!(error, Err(Error::Read { .. })), "{error:?}");
    }
    let error = read_prompts(&files.0.path().join("absent.txt"), Captions::All);
    assert!(matches!(error, Err(Error::Read { .. })), "{error:?}");
}
