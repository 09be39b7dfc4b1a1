package userid

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestField(t *testing.T) {
	t.Parallel()
	for metadata, want := range map[string]struct {
		id    string
		found bool
	}{
		``:                                      {"", false},
		`null`:                                  {"", false},
		`"userId"`:                              {"", false},
		`["userId"]`:                            {"", false},
		`{}`:                                    {"", false},
		`{"userId":null}`:                       {"", false},
		`{"USERID":"eve"}`:                      {"", false},
		`{"a":{"userId":"eve"}}`:                {"", false},
		`{"userId":"ann"}`:                      {"ann", true},
		`{"userId":"ann","USERID":"eve"}`:       {"ann", true},
		`{"a":{"userId":"eve"},"userId":"ann"}`: {"ann", true},
		`{"user\u0049d":"ann"}`:                 {"ann", true},
		`{"userId":"\u0061nn"}`:                 {"ann", true},
		`{"userId":7}`:                          {"7", true},
		`{"userId":"7"}`:                        {"7", true},
		`{"userId":-7}`:                         {"-7", true},
		`{"userId":9007199254740993}`:           {"9007199254740993", true},
		`{"userId":123456789012345678901}`:      {"123456789012345678901", true},
		`{"userId":"ann","userId":"eve"}`:       {"", true},
		`{"userId":null,"userId":"eve"}`:        {"", true},
		`{"userId":"ann","user\u0049d":"eve"}`:  {"", true},
		`{"userId":7.0}`:                        {"", true},
		`{"userId":7e1}`:                        {"", true},
		`{"userId":true}`:                       {"", true},
		`{"userId":["ann"]}`:                    {"", true},
		`{"userId":{"id":"ann"}}`:               {"", true},
		`{"userId":""}`:                         {"", true},
		`{"userId":"\ud800"}`:                   {"", true},
		`{"userId":"\ud801"}`:                   {"", true},
		"{\"userId\":\"a\xff\"}":                {"", true},
		`{"userId":"a\u0000"}`:                  {"", true},
		`{"userId":"a\nb"}`:                     {"", true},
		`{"userId":"\ufffd"}`:                   {"", true},
		`{"userId":"` + strings.Repeat("é", 64) + `"}`:  {strings.Repeat("é", 64), true},
		`{"userId":"` + strings.Repeat("a", 129) + `"}`: {"", true},
		`{"userId":` + strings.Repeat("1", 129) + `}`:   {"", true},
		`{"userId":"ann"`: {"", true},
	} {
		id, found := Field([]byte(metadata), "userId")
		assert.Equal(t, want.id, id, metadata)
		assert.Equal(t, want.found, found, metadata)
	}
}

func TestValid(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]bool{
		"": false, "a": true, "7": true, " ": true, "\t": false, "\x7f": false, "\u0085": false,
		"\xff": false, "\ufffd": false, strings.Repeat("a", 128): true, strings.Repeat("a", 129): false, "名前": true,
	} {
		assert.Equal(t, want, Valid(id), "%q", id)
	}
}
