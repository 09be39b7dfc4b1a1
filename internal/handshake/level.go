package handshake

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// The levels of the wire protocol. The level of a connection never changes.
const (
	LevelStock  = 1 // the stock client: new fields and pushes, but false instead of some errors
	LevelErrors = 2 // error objects instead of false
	levelNewest = LevelErrors
)

// levelParam is the parameter of the socket's URL that holds the level.
const levelParam = "mesh-level"

// LevelOf returns the level that a request asks for: 1 if it asks for none, and the
// newest if it asks for a newer one. The client learns the actual level from the answer
// to its first subscribe request. The error is written for the client.
func LevelOf(r *http.Request) (int, error) {
	level := LevelStock
	found := false
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		name, value, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(name); err != nil || name != levelParam {
			continue
		}
		value, err := url.QueryUnescape(value)
		switch {
		case found:
			return 0, fmt.Errorf("%s is given twice", levelParam)
		case err != nil || !isCount(value):
			return 0, fmt.Errorf("%s must be a whole number from 1 on", levelParam)
		}
		found, level = true, levelNewest
		if n, err := strconv.Atoi(value); err == nil { // otherwise it is larger than any level
			level = min(n, levelNewest)
		}
	}
	return level, nil
}

// isCount reports whether text is a positive integer as JavaScript writes it.
func isCount(text string) bool {
	for i := range len(text) {
		if text[i] < '0' || text[i] > '9' {
			return false
		}
	}
	return text != "" && text[0] != '0'
}
