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

// A key shorter than minKey characters could be guessed. The page's keys are not longer
// than maxKey.
const minKey, maxKey = 22, 128

var colorPattern = regexp.MustCompile(`^#[0-9a-fA-F]{6}$`)

// person is the metadata of a connection. It is how the others see the user. All tabs of
// one user have the same UserID, and the page groups them by it.
type person struct {
	UserID string `json:"userId"`
	Name   string `json:"name"`
	Color  string `json:"color,omitempty"` // none: the page picks one by UserID
}

// authenticate is the Authenticate hook. This example has no accounts. A browser makes up
// a secret key and keeps it, and the key identifies the user. The others see only a hash
// of it, so that they cannot impersonate the user. A real application reads its session
// here.
func authenticate(_ context.Context, r *http.Request) (any, error) {
	key := r.URL.Query().Get("key")
	if len(key) < minKey || len(key) > maxKey {
		key = rand.Text() // a user of this connection alone
	}
	sum := sha256.Sum256([]byte("whoshere user " + key))
	id := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10]))
	return person{UserID: id, Name: "Guest " + id[:4]}, nil
}

// acceptPerson checks the metadata that a client wants to set. It returns the metadata to
// store: a checked name and colour, and always the user id from authenticate.
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

// invisible reports characters that would make a name look like another one, or empty:
// control characters, and marks of direction and width. The joiner is one of them, but it
// is allowed, because emoji of families and flags need it.
func invisible(r rune) bool {
	const joiner = '\u200d'
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) && r != joiner
}
