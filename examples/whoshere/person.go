package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh"
)

// maxName is in characters (code points).
const maxName = 40

// A key shorter than minKey characters could be guessed; one longer than
// maxKey is not the page's.
const minKey, maxKey = 22, 128

var colorPattern = regexp.MustCompile(`^#[0-9a-fA-F]{6}$`)

// person is the metadata of a connection: how it is shown to the others. All
// tabs of one user have the same UserID, and the page groups them by it.
type person struct {
	UserID string `json:"userId"`
	Name   string `json:"name"`
	Color  string `json:"color,omitempty"` // none: the page picks one by UserID
}

// authenticate is the Authenticate hook. There are no accounts here: a browser
// makes up a secret key and keeps it, and who has the key is that user. The
// others are shown only a hash of it, so nobody can pass for somebody else. An
// application reads its session here instead.
func authenticate(_ context.Context, r *http.Request) (any, error) {
	key := r.URL.Query().Get("key")
	if len(key) < minKey || len(key) > maxKey {
		key = rand.Text() // a user of this connection alone
	}
	sum := sha256.Sum256([]byte("whoshere user " + key))
	id := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10]))
	return person{UserID: id, Name: "Guest " + id[:4]}, nil
}

// acceptPerson is the server's word on what people may say about themselves.
// What it returns is stored: a checked name and colour, and the user whom
// authenticate saw, whatever else was sent.
func acceptPerson(_ context.Context, m mesh.Member, proposed json.RawMessage) (any, error) {
	p, err := parsePerson(proposed)
	if err != nil {
		return nil, &mesh.CommandError{Code: "EINVALID", Message: err.Error()}
	}
	known, err := mesh.MetadataOf[person](m)
	if err != nil {
		return nil, err
	}
	p.UserID = known.UserID
	return p, nil
}

func parsePerson(data []byte) (person, error) {
	var said struct{ Name, Color string }
	if !bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return person{}, errors.New("metadata must be an object")
	}
	if err := json.Unmarshal(data, &said); err != nil {
		return person{}, errors.New("name and color must be strings")
	}
	p := person{Name: strings.TrimSpace(said.Name), Color: said.Color}
	switch {
	case p.Name == "":
		return person{}, errors.New("a name is needed")
	case utf8.RuneCountInString(p.Name) > maxName:
		return person{}, errors.New("the name is longer than 40 characters")
	case strings.ContainsFunc(p.Name, invisible):
		return person{}, errors.New("the name holds control characters")
	case p.Color != "" && !colorPattern.MatchString(p.Color):
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
