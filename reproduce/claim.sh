# claim FOLDER DATA: makes the folder of a script's runs, or ends the script if the folder holds runs on other data, which would
# be mistaken for finished ones.
claim() {
    mkdir -p "$1"
    local known=$1/data.txt
    if [ -f "$known" ] && [ "$(cat "$known")" != "$2" ]; then
        echo "$1 holds runs on $(cat "$known"), not on $2: move it away, or delete $known if the images are the same" >&2
        exit 2
    fi
    echo "$2" > "$known"
}
