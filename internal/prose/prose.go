// Package prose keeps a private dialect out of the comments of this repository.
// Comments are read by engineers in a hurry whose English is plain. The test of this
// package lists the comments that contain a mark.
package prose

import (
	"bytes"
	"fmt"
	"go/scanner"
	"go/token"
	"regexp"
	"strings"
)

// A mark is a sign of text that is hard to read, or a word that docs/glossary.md has
// replaced.
type mark struct {
	part    string // in every match, in lower case: most comments need no more than a look for it
	is      *regexp.Regexp
	instead string
}

var marks = []mark{
	{"who", word(`whoever|whom`), "the noun, with if or that"},
	{"body", word(`nobody|somebody|anybody`), "the server, connection, caller or subscriber"},
	{"anew", word(`anew`), "again"},
	{"meanwhile", word(`meanwhile`), "during the call, or since then"},
	{"who ", clause(`who`, `of|to|for|that|and|than|by|with`,
		`is|has|had|does|did|asks|comes|knows|joins|left|leaves|wants|waits|gives|cannot|may|sees|misses|sends|gets|was`),
		"the noun as the subject"},
	{"what ", clause(`what`, `of|to|for|and|than|by|with|from|but|says|like`,
		`is|was|has|had|it|they|the|a|comes|came|stands|runs|waits|needs|does|this|cannot`), "the noun as the subject"},
	{"where", regexp.MustCompile(`(?:^|[.:;] )Where\b`), "if"},
	{"owner.", regexp.MustCompile(`\bowner\.[A-Za-z]`), "local."},
	{"lane", word(`lanes?`), "writer"},
	{"bur", word(`bury|buries|buried|burial`), "declare dead"},
	{"reap", word(`reap|reaps|reaped|reaping|reaper`), "clean up"},
	{"patience", word(`patience`), "contact, or the time"},
	{"verdict", word(`verdicts?`), "answer of a guard"},
	{"stray", word(`strays?`), "orphan, or hanging"},
	{"parcel", word(`parcels?`), "buffered event"},
	{"roster", word(`roster`), "members"},
	{"beat", word(`beats?`), "echo, or heartbeat"},
	{"reb", word(`reborn|rebirth|rebear`), "reregister"},
	{"audit", word(`audits?|audited|auditing`), "reconcile"},
	{"doubt", word(`doubts?`), "unconfirmed"},
}

// word matches whole words, also at the beginning of a sentence.
func word(alternatives string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)\b(?:` + alternatives + `)\b`)
}

// clause matches a pronoun that begins a clause in place of a noun: at the beginning of
// a sentence, or after a preposition, before one of the verbs.
func clause(pronoun, before, verbs string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)(?:^|[.:;,] |\b(?:` + before + `) )` + pronoun + ` (?:` + verbs + `)\b`)
}

// quoted matches names of code and values in comments, which are not prose.
var quoted = regexp.MustCompile("\"[^\"]*\"|`[^`]*`")

// Find returns the marks in the comments of a Go file, each with its line.
func Find(name string, source []byte) []string {
	var found []string
	for _, c := range comments(source) {
		text := quoted.ReplaceAllString(c.text, `""`)
		lower := strings.ToLower(text)
		for _, m := range marks {
			if !strings.Contains(lower, m.part) {
				continue
			}
			for _, at := range m.is.FindAllString(text, -1) {
				found = append(found, fmt.Sprintf("%s:%d: %q, use %s: %s", name, c.line, strings.Trim(at, ".:;, "), m.instead, c.text))
			}
		}
	}
	return found
}

// A comment is one paragraph of a comment.
type comment struct {
	line int
	text string
}

// comments returns the paragraphs of a file's line comments, without the code in them.
func comments(source []byte) []comment {
	fset := token.NewFileSet()
	file := fset.AddFile("", -1, len(source))
	var s scanner.Scanner
	s.Init(file, source, nil, scanner.ScanComments)
	var all []comment
	last := 0 // line of the last paragraph's last line
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return all
		}
		if tok != token.COMMENT {
			continue
		}
		line := file.Line(pos)
		text, isLine := strings.CutPrefix(lit, "//")
		if !isLine || strings.TrimSpace(text) == "" || strings.HasPrefix(text, "\t") || !strings.HasPrefix(text, " ") {
			continue // a blank line, code, or a directive
		}
		text = strings.TrimSpace(text)
		if len(all) > 0 && line == last+1 && follows(source, file.Offset(pos)) {
			all[len(all)-1].text += " " + text
		} else {
			all = append(all, comment{line: line, text: text})
		}
		last = line
	}
}

// follows reports whether the comment at an offset has its line for itself, so that it
// may continue the comment before it.
func follows(source []byte, offset int) bool {
	start := bytes.LastIndexByte(source[:offset], '\n') + 1
	return len(bytes.TrimSpace(source[start:offset])) == 0
}
