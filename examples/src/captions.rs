//! Captions of Fashion-MNIST, made from its labels.
//!
//! A caption is a phrasing with a name of the class in it. Some phrasings are held out: no network is trained on them,
//! so they show whether it has learned the meaning of the words or only the training sentences.

use ddil_core::{RandomStreams, Stream};

/// The names of each class, by label.
pub const NAMES: [&[&str]; 10] = [
    &["a t-shirt", "a tee", "a top"],
    &["trousers", "pants", "a pair of trousers"],
    &["a pullover", "a sweater", "a jumper"],
    &["a dress", "a gown"],
    &["a coat", "an overcoat"],
    &["a sandal", "an open shoe"],
    &["a shirt", "a blouse"],
    &["a sneaker", "a trainer"],
    &["a bag", "a handbag"],
    &["an ankle boot", "a boot"],
];

/// The phrasings to train on; `[a thing]` is replaced by the name, `[thing]` by the name without its article.
pub const PHRASINGS: [&str; 12] = [
    "[thing]",
    "[a thing]",
    "a picture of [a thing]",
    "a photo of [a thing]",
    "a grey photo of [a thing]",
    "a small picture of [a thing]",
    "[a thing], grey on black",
    "[a thing] on a black background",
    "[thing], product photo",
    "this is [a thing]",
    "here you see [a thing]",
    "a photo of [a thing] from a shop",
];

/// The phrasings to test with: words of the training phrasings, in other sentences.
pub const HELD_OUT: [&str; 4] = [
    "a small grey picture of [a thing]",
    "this is a photo of [a thing] on black",
    "[thing] from a shop, black background",
    "here is a product picture: [a thing]",
];

/// A phrasing with a name in it.
pub fn caption(phrasing: &str, name: &str) -> String {
    let bare = ["a ", "an "].iter().find_map(|article| name.strip_prefix(article));
    phrasing.replace("[a thing]", name).replace("[thing]", bare.unwrap_or(name))
}

/// Every caption of a class in these phrasings; none for an unknown label.
pub fn captions(phrasings: &[&str], label: usize) -> Vec<String> {
    let names = NAMES.get(label).copied().unwrap_or_default();
    let pairs =
        phrasings.iter().flat_map(|phrasing| names.iter().map(move |name| (phrasing, name)));
    pairs.map(|(phrasing, name)| caption(phrasing, name)).collect()
}

/// Up to `count` captions of the image with this number in the data set, each in a different one of [`PHRASINGS`]:
/// deterministic, and spread evenly over the images.
pub fn of_image(label: usize, index: u64, count: usize) -> Vec<String> {
    let Some(names) = NAMES.get(label) else { return Vec::new() };
    let start = RandomStreams::new(0, 0).seed_of(index, Stream::Condition) as usize;
    // 5 and 12 are coprime, so twelve steps of 5 visit every phrasing once.
    let one = |i: usize| {
        let phrasing = PHRASINGS[(start % PHRASINGS.len() + 5 * i) % PHRASINGS.len()];
        caption(phrasing, names[(start / PHRASINGS.len() + i) % names.len()])
    };
    (0..count.min(PHRASINGS.len())).map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn all(phrasings: &[&str]) -> Vec<String> {
        (0..NAMES.len()).flat_map(|label| captions(phrasings, label)).collect()
    }

    #[test]
    fn a_caption_names_one_class() {
        let mut labels: BTreeMap<String, usize> = BTreeMap::new();
        for label in 0..NAMES.len() {
            for caption in captions(&[PHRASINGS.as_slice(), &HELD_OUT].concat(), label) {
                let other = labels.insert(caption.clone(), label);
                // "trousers" is the same with and without an article.
                assert!(other.is_none_or(|other| other == label), "{caption}: {other:?}, {label}");
            }
        }
        assert_eq!(
            caption("[thing], or [a thing]", "an ankle boot"),
            "ankle boot, or an ankle boot"
        );
        assert_eq!(caption("[thing], or [a thing]", "trousers"), "trousers, or trousers");
        assert!(captions(&PHRASINGS, NAMES.len()).is_empty());
    }

    #[test]
    fn held_out_captions_are_new_and_their_words_are_not() {
        let trained: BTreeSet<String> = all(&PHRASINGS).into_iter().collect();
        let words = |caption: &String| {
            let split = caption.split([' ', ',', ':']).filter(|word| !word.is_empty());
            split.map(str::to_owned).collect::<Vec<_>>()
        };
        let known: BTreeSet<String> = trained.iter().flat_map(words).collect();
        for caption in all(&HELD_OUT) {
            assert!(!trained.contains(&caption), "{caption}");
            assert!(words(&caption).iter().all(|word| known.contains(word)), "{caption}");
        }
    }

    #[test]
    fn captions_of_an_image_depend_only_on_its_number() {
        let mut met = BTreeMap::new();
        for index in 0..1200 {
            let four = of_image(5, index, 4);
            assert_eq!(four, of_image(5, index, 4));
            assert_eq!(four.iter().collect::<BTreeSet<_>>().len(), 4);
            *met.entry(four[0].clone()).or_insert(0) += 1;
            assert!(four.iter().all(|caption| captions(&PHRASINGS, 5).contains(caption)));
        }
        // 24 captions, each about 50 times.
        assert_eq!(met.len(), 24);
        assert!(met.values().all(|n| (20..90).contains(n)), "{met:?}");
        assert_eq!(of_image(0, 3, 100).len(), PHRASINGS.len());
        assert!(of_image(10, 3, 4).is_empty());
    }
}
