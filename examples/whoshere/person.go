package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh"
)

// maxName is in characters (code points).
const maxName = 40

var colorPattern = regexp.MustCompile(`^#[0-9a-fA-F]{6}$`)

// person is the metadata of a connection: how it is shown to the others.
type person struct {
	Name  string `json:"name"`
	Color string `json:"color,omitempty"`
}

// acceptPerson is the server's word on what people may say about themselves.
// What it returns is stored: a checked name and colour, whatever else was sent.
func acceptPerson(_ context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) {
	p, err := parsePerson(proposed)
	if err != nil {
		return nil, &mesh.CommandError{Code: "EINVALID", Message: err.Error()}
	}
	return p, nil
}

// randomPerson is somebody who may not choose; the page picks a colour.
func randomPerson() person { return person{Name: "Guest " + rand.Text()[:4]} }

func parsePerson(data []byte) (person, error) {
	var p person
	if !bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return person{}, errors.New("metadata must be an object")
	}
	if err := json.Unmarshal(data, &p); err != nil {
		return person{}, errors.New("name and color must be strings")
	}
	p.Name = strings.TrimSpace(p.Name)
	switch {
	case p.Name == "":
		return person{}, errors.New("a name is needed")
	case utf8.RuneCountInString(p.Name) > maxName:
		return person{}, errors.New("the name is longer than 40 characters")
	case strings.ContainsFunc(p.Name, invisible):
		return person{}, errors.New("the name holds control characters")
	case !colorPattern.MatchString(p.Color):
		return person{}, errors.New("the color is not like #4f46e5")
	}
	return p, nil
}

// invisible reports characters that would make a name look like another, or
// like nothing: controls, and marks of direction and width. The joiner is one
// too, but families and flags are made with it.
func invisible(r rune) bool {
	const joiner = '\u200d'
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) && r != joiner
}
