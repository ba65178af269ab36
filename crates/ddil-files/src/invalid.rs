use std::fmt::Display;

/// An invalid value of a setting: the setting, the value found, and the values expected.
///
/// Every crate of the workspace reports invalid settings with this type. The `invalid` method of each crate's error
/// returns it.
///
/// # Example
///
/// ```
/// use ddil_files::Invalid;
///
/// let invalid = Invalid::new("eta", 1.5, "in 0..=1");
/// assert_eq!(invalid.to_string(), "`eta` is 1.5; expected in 0..=1");
/// assert_eq!(invalid.under("sampler").field, "sampler.eta");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {value}; expected {expected}")]
#[non_exhaustive]
pub struct Invalid {
    /// The setting as spelt in a config file: keys joined by dots, several settings separated by commas.
    pub field: String,
    /// The value that was found.
    pub value: String,
    /// The values that are allowed.
    pub expected: String,
}

impl Invalid {
    /// The error for the value `value` of `field`; `expected` describes the allowed values.
    pub fn new(field: impl Into<String>, value: impl Display, expected: impl Into<String>) -> Self {
        Self { field: field.into(), value: value.to_string(), expected: expected.into() }
    }

    /// The same error with the setting inside the table `table`. With several settings, each gets the prefix.
    #[must_use]
    pub fn under(self, table: &str) -> Self {
        let fields: Vec<String> =
            self.field.split(", ").map(|field| format!("{table}.{field}")).collect();
        Self { field: fields.join(", "), ..self }
    }
}

/// Names between commas, for a message: the first 20 and the number of the others.
///
/// # Example
///
/// ```
/// assert_eq!(ddil_files::listed(["bag", "coat"]), "bag, coat");
/// ```
pub fn listed<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    const SHOWN: usize = 20;
    let names: Vec<S> = names.into_iter().collect();
    let shown = names.iter().take(SHOWN).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_settings_are_prefixed_one_by_one() {
        let invalid = Invalid::new("beta_start, beta_end", "2, 1", "in order").under("schedule");
        assert_eq!(invalid.field, "schedule.beta_start, schedule.beta_end");
    }
}
