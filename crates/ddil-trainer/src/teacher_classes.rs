//! The classes of a teacher, which decide what a label means.

use std::collections::BTreeMap;

use ddil_files::{Invalid, listed};
use ddil_pipelines::Pipeline;

use crate::error::{Error, Result};

/// The classes of a class-conditional teacher.
#[derive(Clone, Debug)]
pub(crate) struct TeacherClasses {
    /// The names in its card, by label; none if there is no card or it has none.
    names: Vec<String>,
    /// Number of its labels, the null class included if it has one.
    num_labels: i64,
    null_class: Option<i64>,
}

impl TeacherClasses {
    /// The classes of a teacher; none for a network without labels.
    pub(crate) fn of(teacher: &Pipeline) -> Option<Self> {
        let num_labels = teacher.network.config().num_class_embeds().map(i64::from)?;
        let card = &teacher.card;
        Some(Self { names: card.class_names.clone(), num_labels, null_class: card.null_class })
    }

    /// Whether the card has names that are more than the labels as text.
    fn is_named(&self) -> bool {
        (0..).zip(&self.names).any(|(label, name): (i64, _)| *name != label.to_string())
    }

    /// The labels of all classes, without the null class.
    pub(crate) fn labels(&self) -> Vec<i64> {
        let end = if self.names.is_empty() { self.num_labels } else { self.names.len() as i64 };
        (0..end).filter(|label| Some(*label) != self.null_class).collect()
    }

    /// The name of every label; labels without one have their number.
    pub(crate) fn all_names(&self) -> Vec<String> {
        let name = |label: i64| self.names.get(label as usize).cloned();
        let labels = 0..self.num_labels.max(self.names.len() as i64);
        labels.map(|label| name(label).unwrap_or_else(|| label.to_string())).collect()
    }

    /// The names in the card of a student: those of the teacher's card, or numbers up to the null class.
    pub(crate) fn card_names(&self) -> Vec<String> {
        if !self.names.is_empty() {
            return self.names.clone();
        }
        let end = self.null_class.filter(|null| *null >= 0).unwrap_or(self.num_labels);
        (0..end.min(self.num_labels)).map(|label| label.to_string()).collect()
    }

    /// The label of a class, by its name or, if the classes have none, by its number.
    fn label(&self, name: &str) -> Option<i64> {
        if self.is_named() {
            return self.names.iter().position(|own| own == name).map(|label| label as i64);
        }
        name.parse().ok().filter(|label| self.labels().contains(label))
    }

    /// What a class may be called, for a message.
    pub(crate) fn expected(&self) -> String {
        if self.is_named() {
            return format!("classes of the teacher: {}", listed(&self.names));
        }
        let last = self.labels().last().copied().unwrap_or(0);
        format!("numbers of the teacher's classes, which have no names: 0 to {last}")
    }

    /// The labels of classes, all of which the teacher must know; `field` is the setting that contains them.
    pub(crate) fn labels_of(&self, field: &str, names: &[String]) -> Result<Vec<i64>> {
        let known: Option<Vec<i64>> = names.iter().map(|name| self.label(name)).collect();
        known.ok_or_else(|| {
            let unknown = names.iter().filter(|name| self.label(name).is_none());
            Error::Invalid(Invalid::new(field, listed(unknown), self.expected()))
        })
    }

    /// The teacher's label of each class of data.
    ///
    /// `classes` are the names of the data's classes, `given` those that the config gives them.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the names of both for a class that the teacher does not know.
    pub(crate) fn map(
        &self,
        classes: &[String],
        given: Option<&BTreeMap<String, String>>,
    ) -> Result<Vec<i64>> {
        if let Some(given) = given {
            let names: Vec<String> = classes.iter().map(|class| given[class].clone()).collect();
            return self.labels_of("data.classes", &names);
        }
        let known: Option<Vec<i64>> = classes.iter().map(|class| self.label(class)).collect();
        match known {
            Some(labels) if self.is_named() => Ok(labels),
            _ if self.is_named() => Err(self.unknown(classes)),
            _ => self.in_order(classes),
        }
    }

    /// The labels of the classes of data for a teacher whose classes have no names: their order, if their numbers are
    /// equal.
    fn in_order(&self, classes: &[String]) -> Result<Vec<i64>> {
        let own = self.labels();
        // Without a card it is unknown whether the last label is the null class.
        let agrees = classes.len() == own.len()
            || (self.null_class.is_none()
                && self.names.is_empty()
                && classes.len() + 1 == own.len());
        if !agrees {
            return Err(self.unknown(classes));
        }
        let labels = own[..classes.len()].to_vec();
        let moved = classes
            .iter()
            .zip(&labels)
            .find(|(class, label)| class.parse().is_ok_and(|number: i64| number != **label));
        if let Some((class, label)) = moved {
            tracing::warn!(
                "the teacher's classes have no names and the data's are taken in alphabetical order: {class:?} is \
                 label {label}; data.classes sets other labels"
            );
        } else {
            tracing::info!(
                "the teacher's classes have no names; those of the data are its labels in alphabetical order: {}",
                listed(classes)
            );
        }
        Ok(labels)
    }

    fn unknown(&self, classes: &[String]) -> Error {
        let unknown: Vec<&String> =
            classes.iter().filter(|class| self.label(class).is_none()).collect();
        let found = match unknown.len() {
            0 => format!("of {} classes, {}", classes.len(), listed(classes)),
            n if n == classes.len() => {
                format!("of classes that the teacher does not know, {}", listed(classes))
            }
            _ => format!(
                "of the classes {}, of which the teacher does not know {}",
                listed(classes),
                listed(unknown)
            ),
        };
        let expected = format!(
            "{}. Name the teacher's class of each of the data's in data.classes, or leave classes out with \
             data.exclude_classes",
            self.expected()
        );
        Error::Invalid(Invalid::new("data", found, expected))
    }
}
