//! `--keep PATTERN=lossless|BPP`: what the user says of single tensors.

use std::str::FromStr;

use globset::{Glob, GlobMatcher};

/// What a rule asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// Every byte the same.
    Lossless,
    /// So many bits per element.
    Rate(f64),
}

impl std::fmt::Display for Keep {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lossless => formatter.write_str("lossless"),
            Self::Rate(bits) => write!(formatter, "{bits}"),
        }
    }
}

/// One rule.
#[derive(Clone, Debug)]
pub struct KeepRule {
    /// As it was given.
    text: String,
    pattern: GlobMatcher,
    keep: Keep,
}

/// A rule that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum KeepRuleError {
    /// No `=`, or nothing before it.
    #[error("expected PATTERN=lossless or PATTERN=BITS")]
    Form,
    /// What follows the last `=`.
    #[error("`{0}`: expected `lossless`, or bits per element from 0.1 to 12")]
    Kept(String),
    /// The pattern.
    #[error(transparent)]
    Pattern(#[from] globset::Error),
}

impl FromStr for KeepRule {
    type Err = KeepRuleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pattern, kept) = text.rsplit_once('=').ok_or(KeepRuleError::Form)?;
        if pattern.is_empty() {
            return Err(KeepRuleError::Form);
        }
        let keep = match kept {
            "lossless" => Keep::Lossless,
            rate => match rate.parse() {
                Ok(bits) if (0.1..=12.0).contains(&bits) => Keep::Rate(bits),
                _ => return Err(KeepRuleError::Kept(rate.to_owned())),
            },
        };
        Ok(Self { text: text.to_owned(), pattern: Glob::new(pattern)?.compile_matcher(), keep })
    }
}

impl KeepRule {
    /// Whether tensors may lose anything by the rule.
    pub fn is_lossy(&self) -> bool {
        self.keep != Keep::Lossless
    }

    /// Whether the rule speaks of this tensor.
    pub fn matches(&self, tensor: &str) -> bool {
        self.pattern.is_match(tensor)
    }
}

impl std::fmt::Display for KeepRule {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// What the rules say of a tensor: the last that matches counts.
pub fn kept(rules: &[KeepRule], tensor: &str) -> Option<Keep> {
    rules.iter().rev().find(|rule| rule.matches(tensor)).map(|rule| rule.keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<KeepRule> {
        texts.iter().map(|text| text.parse().expect("a rule")).collect()
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        let rules = rules(&["*.weight=4.5", "lm_head.*=lossless", "{wte,wpe}.weight=8"]);
        assert_eq!(kept(&rules, "h.0.mlp.weight"), Some(Keep::Rate(4.5)));
        assert_eq!(kept(&rules, "lm_head.weight"), Some(Keep::Lossless));
        assert_eq!(kept(&rules, "wpe.weight"), Some(Keep::Rate(8.0)));
        assert_eq!(kept(&rules, "h.0.mlp.bias"), None);
    }

    #[test]
    fn rules_that_make_no_sense_are_errors() {
        for text in ["lossless", "=4", "a=", "a=0", "a=13", "a=NaN", "a[=4", "a=Lossless"] {
            assert!(text.parse::<KeepRule>().is_err(), "{text}");
        }
    }
}
