// Package browsertest tries the page of whoshere in headless Chromium: two
// browsers, two servers, one Redis. It is a module of its own, so that the
// library's module needs no browser driver.
//
//	go test ./...
//	go test -run TestPicture -picture ../../../docs/whoshere.png
//
// Without Chromium or a redis-server the tests are skipped; with
// MESH_REQUIRE_BROWSER=1 and MESH_REQUIRE_REDIS=1 they fail. MESH_CHROMIUM
// names another browser of that family.
package browsertest
